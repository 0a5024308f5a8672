"""A loaded model, cast, copied, dequantized or sent to the hub: what it saves loads again as what it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import compress
from compress.cache.attached import CACHE_MODULE, new_cache
from compress.checkpoint import GUARD, read_report
from compress.cli import app
from compress.layers import CompressedLinear
from compress.recipe import Recipe
from compress.run import run
from helpers import save_tiny, tiny_recipe

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(3, 60)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def packed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers = [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
    return {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] in layers}


def guard_of(path: Path) -> str | None:
    return json.loads((path / "config.json").read_text()).get("transformers_weights")


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with a matrix behind its final norm, and a KV cache with bases."""
    folder = tmp_path_factory.mktemp("rotated")
    source = save_tiny(folder / "model", "llama")
    weights = {"method": "quarot", "bits": 8}
    recipe = {**tiny_recipe(), "weights": weights, "kv_cache": {"method": "per_token", "basis": "hadamard"}}
    run(source, Recipe.from_dict(recipe), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cast_model_saves_what_loads_again(dtype: torch.dtype, rotated: Path, tmp_path: Path) -> None:
    exact, model = compress.load(rotated), compress.load(rotated).to(dtype)
    assert model.model.layers[0].input_layernorm.weight.dtype == dtype
    for key, tensor in packed(exact).items():
        assert torch.equal(tensor, packed(model)[key]) and tensor.dtype == packed(model)[key].dtype, key
    bases = {key: tensor for key, tensor in exact.state_dict().items() if key.startswith(CACHE_MODULE)}
    assert bases and all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in bases.items())
    model.save_pretrained(tmp_path / "cast")
    before, after = model.state_dict(), compress.load(tmp_path / "cast").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_what_is_uploaded_has_the_guard(tiny_compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress.load(tiny_compressed)
    uploaded = []

    class Hub:
        create_repo = staticmethod(lambda repo, **_: type("Repo", (), {"repo_id": repo}))

    class Card:
        save = staticmethod(lambda _: None)

    def upload(self: torch.nn.Module, folder: str, *_: object, **__: object) -> None:
        uploaded.append((guard_of(Path(folder)), (Path(folder) / "report.json").exists()))

    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: Card)
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.save_pretrained(tmp_path / "again", push_to_hub=True)
    assert uploaded == [(GUARD, True)] and guard_of(tmp_path / "again") == GUARD


def test_only_the_main_process_writes_the_config(tiny_compressed: Path, tmp_path: Path) -> None:
    compress.load(tiny_compressed).save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert list((tmp_path / "rank1").iterdir()) == []


def test_report_and_recipe_go_along(tiny_compressed: Path, tmp_path: Path) -> None:
    compress.load(tiny_compressed).save_pretrained(tmp_path / "again")
    for name in ("report.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_compressed / name).read_bytes()


def test_a_deep_copy_saves_itself(tiny_compressed: Path, tmp_path: Path) -> None:
    model = compress.load(tiny_compressed)
    twin = copy.deepcopy(model)
    model.model.norm.weight.data.zero_()
    twin.save_pretrained(tmp_path / "twin")
    assert guard_of(tmp_path / "twin") == GUARD
    assert torch.equal(logits(compress.load(tmp_path / "twin")), logits(compress.load(tiny_compressed)))


def test_a_dequantized_model_saves_as_a_plain_one(rotated: Path, tmp_path: Path) -> None:
    model = compress.load(rotated)
    want = logits(model)
    model.dequantize()
    assert torch.allclose(logits(model), want, rtol=1e-3, atol=1e-3 * float(want.std())) and new_cache(model) is None
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > IDS.shape[1]
    model.save_pretrained(tmp_path / "plain")
    assert guard_of(tmp_path / "plain") is None and not (tmp_path / "plain" / "report.json").exists()
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(plain), logits(model))


def test_a_saved_model_can_still_be_dequantized(tiny_compressed: Path, tmp_path: Path) -> None:
    """Saving leaves the dtype as a word in the config, which transformers hands to `dequantize`."""
    model = compress.load(tiny_compressed)
    want = logits(model)
    model.save_pretrained(tmp_path / "again")
    model.dequantize()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert torch.allclose(logits(model), want, rtol=1e-3, atol=1e-3 * float(want.std()))


def test_the_report_tells_the_bytes_that_were_saved(tiny_compressed: Path, tmp_path: Path) -> None:
    compress.load(tiny_compressed, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors").values()
    report = read_report(tmp_path / "half")
    assert report.checkpoint_bytes == sum(tensor.nbytes for tensor in stored)
    assert report.checkpoint_bytes < read_report(tiny_compressed).checkpoint_bytes


def test_a_device_map_by_hand_need_not_name_what_is_ours(rotated: Path) -> None:
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", *(f"model.layers.{n}" for n in range(3))]
    model = compress.load(rotated, device_map=dict.fromkeys(parts, "cpu"))
    assert torch.equal(logits(model), logits(compress.load(rotated)))
    assert all(not basis.is_meta for basis in getattr(model, CACHE_MODULE).buffers())


def test_device_map_auto(tiny_compressed: Path) -> None:
    model = compress.load(tiny_compressed, device_map="auto")
    assert torch.allclose(logits(model).cpu(), logits(compress.load(tiny_compressed)), atol=1e-5)


def test_a_checkpoint_without_its_report_still_tells_its_sizes(tiny_compressed: Path, tmp_path: Path) -> None:
    compress.load(tiny_compressed).save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "report.json").unlink()
    told, known = read_report(tmp_path / "again"), read_report(tiny_compressed)
    assert [m.name.split(".")[2] for m in told.modules] == [m.name.split(".")[2] for m in known.modules]
    for report in (told, known):
        report.modules.sort(key=lambda module: module.name)
    assert [(m.name, m.spec, m.packed_bytes) for m in told.modules] == [
        (m.name, m.spec, m.packed_bytes) for m in known.modules
    ]
    assert told.checkpoint_bytes == known.checkpoint_bytes
    assert told.modules[0].error is None and told.worst is None and told.table().row_count < known.table().row_count
    json.dumps(told.to_dict(), allow_nan=False)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "again")])
    assert shown.exit_code == 0 and "unknown" in shown.stdout and UP in shown.stdout


PACKED = {
    "integers": {"method": "rtn", "bits": 3, "group_size": 24},
    "two parts, transformed": {"method": "resq", "bits": 4, "activation_bits": 16},
    "unit vectors": {"method": "cospadi", "dictionary": "identity", "ratio": 0.3},
    "integers, pruned": {"method": "cospadi", "dictionary": "identity", "value_bits": 4, "ratio": 0.75, "group_size": 32},
    "atoms": tiny_recipe()["weights"],
    "both": {**tiny_recipe()["weights"], "dictionary": "identity+learned"},
    "both, integers": {
        **tiny_recipe()["weights"], "dictionary": "identity+learned", "value_bits": 6, "dictionary_bits": 5, "ratio": 0.7,
    },
    "low rank": {"method": "svd_llm", "ratio": 0.2},
    "rounded inputs": {"method": "gptq", "bits": 4, "activation_bits": 8},
}  # fmt: skip


@pytest.mark.parametrize("weights", PACKED.values(), ids=PACKED)
def test_gradients_pass_through_packed_layers(weights: dict, tmp_path: Path) -> None:
    """Those of the same model multiplied out, for few tokens and many; nothing packed is trained."""
    run(save_tiny(tmp_path / "tiny"), Recipe.from_dict({**tiny_recipe(), "weights": weights}), tmp_path / "out")
    ours, dense = (compress.load(tmp_path / "out", dtype=torch.float32) for _ in range(2))
    layers = [module for module in ours.modules() if isinstance(module, CompressedLinear)]
    assert layers and not any(tensor.requires_grad for layer in layers for tensor in layer.parameters())
    dense.dequantize()
    for tokens in (4, 57) if weights.get("activation_bits", 16) == 16 else ():  # the other model rounds none
        gradients = []
        for model in (ours, dense):
            seen = model.get_input_embeddings()(IDS[:, :tokens]).detach().requires_grad_()
            model(inputs_embeds=seen).logits.square().sum().backward()
            gradients.append(seen.grad)
        assert torch.linalg.norm(gradients[0] - gradients[1]) < 1e-3 * torch.linalg.norm(gradients[1])
    packed_layer = ours.get_submodule(UP)
    x = torch.randn(3, packed_layer.in_features, requires_grad=True)
    packed_layer(x).add_(1).sum().backward()  # as Falcon adds its residual, in place
    assert torch.allclose(x.grad, packed_layer.dense_weight().sum(dim=0).expand(3, -1), rtol=1e-4, atol=1e-4)
