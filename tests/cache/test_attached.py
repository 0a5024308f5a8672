"""A cache that belongs to a checkpoint: recipe in, plain `generate` out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.cache import KVCache, query_moments
from compress.cache.attached import new_cache
from compress.errors import CompressError
from compress.evaluate.quality import empty_cache, log_probabilities
from compress.recipe import Recipe
from compress.run import run
from helpers import save_tiny

IDS = torch.arange(3, 60)[None]
CALIBRATION = {"dataset": "python-docs", "samples": 8, "length": 64}
CHANGES = [f"calibration.{key}={value}" for key, value in CALIBRATION.items()]


@pytest.fixture(scope="module")
def resq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resq")
    source = save_tiny(folder / "model", "qwen2", head_dim=64)
    run(source, Recipe.load("resq", CHANGES), folder / "out")
    return folder / "out"


def test_generate_uses_the_checkpoints_cache(resq: Path) -> None:
    model = compress.load(resq)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, **options, return_dict_in_generate=True)
    assert isinstance(plain.past_key_values, KVCache)
    given = model.generate(IDS, **options, past_key_values=new_cache(model))
    assert torch.equal(plain.sequences, given)
    other = model.generate(IDS, **options, use_cache=False, return_dict_in_generate=True)
    assert other.past_key_values is None
    static = model.generate(IDS, **options, cache_implementation="static", return_dict_in_generate=True)
    assert not isinstance(static.past_key_values, KVCache)


def test_keys_have_bases_and_values_are_folded(resq: Path) -> None:
    model = compress.load(resq)
    bases = model.compress_kv
    assert sorted(bases.of("keys")) == [0, 1, 2] and not bases.of("values")
    basis = bases.of("keys")[1]
    assert basis.dtype == torch.float32 and torch.allclose(basis.mT @ basis, torch.eye(64).expand(2, -1, -1), atol=1e-5)
    cache = new_cache(model)
    log_probabilities(model, IDS[0], empty_cache(model))
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
    assert cache.bits_per_element == 8 * 44 / 64  # 56 channels in 4 bits, 8 in 8, two scales and minima of 16 bits


def test_evaluation_reads_through_the_cache(resq: Path) -> None:
    model = compress.load(resq)
    through = log_probabilities(model, IDS[0], empty_cache(model))
    with torch.inference_mode():
        without = torch.log_softmax(model(IDS, use_cache=False).logits[0, :-1], dim=-1)
    assert 1e-4 < (through - without).abs().max() < 2


def test_bases_stay_fp32_and_survive_saving(resq: Path, tmp_path: Path) -> None:
    model = compress.load(resq).to(torch.bfloat16)
    before = model.compress_kv.of("keys")
    assert all(basis.dtype == torch.float32 for basis in before.values())
    model.save_pretrained(tmp_path / "again")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "again").compress_kv.of("keys")
    assert all(torch.equal(before[layer], after[layer]) for layer in before)


def test_the_dense_export_has_no_trace_of_it(resq: Path, tmp_path: Path) -> None:
    compress.export_dense(resq, tmp_path / "dense")
    assert "compress_kv" not in (tmp_path / "dense" / "model.safetensors").read_bytes()[:20000].decode("latin1")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").generate(IDS, max_new_tokens=2).shape[1] > 57


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "asks for"),
        ({"bases": {"keys": [0, 7], "values": []}}, "missing|does not"),
        ({"method": "squatt"}, "unknown KV cache method"),
        ({"options": {"bits": 1}}, "bits"),
        ({"head_dim": -1}, "impossible|damaged"),
    ],
    ids=str,
)
def test_damaged_entries_are_refused(change: dict, message: str, resq: Path, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "damaged"
    shutil.copytree(resq, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["kv_cache"].update(change)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match=message):
        compress.load(path)


def test_recipe_mistakes_are_named() -> None:
    base = {"weights": {"method": "rtn"}}
    for block, message in [
        ({"bits": 4, "sink": 2}, "sink_tokens"),
        ({"method": "pertoken"}, "per_token"),
        ({"bits": 1}, "bits"),
        (4, "mapping"),
        ({"basis": "fourier"}, "basis"),
    ]:
        with pytest.raises(CompressError, match=message):
            Recipe.from_dict({**base, "kv_cache": block})


def test_a_calibrated_metric_is_the_queries_of_the_text(tmp_path: Path) -> None:
    """Kept in the checkpoint, the same for every conversation; Gemma's sliding layers need none."""
    source = save_tiny(tmp_path / "model", "gemma3_text")
    recipe = {
        "weights": {"method": "rtn", "bits": 8},
        "kv_cache": {"method": "squat", "metric": "calibration", "window": 8, "group_size": 8},
        "calibration": {"dataset": "python-docs", "samples": 4, "length": 64},
    }
    run(source, Recipe.from_dict(recipe), tmp_path / "out")
    model = compress.load(tmp_path / "out")
    metrics, cache = model.compress_kv.of("metrics"), new_cache(model)
    packed = [index for index, layer in enumerate(cache.layers) if not layer.is_sliding]
    assert sorted(metrics) == packed
    for index, metric in metrics.items():
        assert torch.allclose(metric.diagonal(dim1=1, dim2=2).mean(1), torch.ones(metric.shape[0]), atol=1e-4)
        assert torch.equal(cache.layers[index].given, metric)
    ids = torch.randint(3, 256, (2, 200))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert all(cache.layers[index].stores[0].given[1][0].any() for index in packed)
    own = query_moments(model, ids)
    assert sorted(own) == packed
    for index, metric in own.items():  # random ids and documentation: alike in kind, not in numbers
        likeness = torch.nn.functional.cosine_similarity(metric.flatten(1), metrics[index].flatten(1))
        assert (likeness > 0.5).all() and not torch.equal(metric, metrics[index])
    with torch.no_grad():
        model(ids, past_key_values=KVCache(model, "squat", metrics=own, window=8))
    with pytest.raises(CompressError, match="kivi takes no metric"):
        Recipe.from_dict({**recipe, "kv_cache": {"method": "kivi", "metric": "calibration"}})


def test_queries_may_pick_the_keys_directions(tmp_path: Path) -> None:
    """With their moments alone the high part holds what queries read, not what keys have most of."""
    source = save_tiny(tmp_path / "model", "llama", head_dim=64)
    energy = {}
    for share in (0.0, 1.0):
        recipe = Recipe.load("resq", [*CHANGES, f"kv_cache.query_share={share}"])
        run(source, recipe, tmp_path / str(share))
        basis = compress.load(tmp_path / str(share)).compress_kv.of("keys")[0]
        moments = query_moments(AutoModelForCausalLM.from_pretrained(source), torch.randint(3, 256, (4, 64)))[0]
        rotated = basis.mT @ moments @ basis
        energy[share] = float(
            (rotated.diagonal(dim1=1, dim2=2)[:, -8:].sum(1) / moments.diagonal(dim1=1, dim2=2).sum(1)).mean()
        )
    assert energy[1.0] > 1.2 * energy[0.0], energy
    with pytest.raises(CompressError, match="needs basis: pca"):
        Recipe.load("resq", ["kv_cache.query_share=0.5", "kv_cache.basis=hadamard"])


CACHES = {
    "basis": {"method": "per_token", "bits": 8, "basis": "pca", "high_share": 0.25},
    "metric": {"method": "squat", "metric": "calibration"},
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(
    ("family", "changes"), [("phi", {}), ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 96, "num_key_value_heads": None})]
)
def test_models_of_other_shapes_have_bases(family: str, changes: dict, cache: dict, tmp_path: Path) -> None:
    """Without an `mlp.down_proj`, or a word for the number of KV heads."""
    source = save_tiny(tmp_path / "model", family, **changes)
    run(
        source,
        Recipe.from_dict({"calibration": CALIBRATION, "weights": {"method": "rtn"}, "kv_cache": cache}),
        tmp_path / "out",
    )
    model = compress.load(tmp_path / "out")
    made = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert isinstance(made.past_key_values, KVCache) and made.sequences.shape[1] == IDS.shape[1] + 4
