"""The whole path on tiny models: compress, save, load, generate, export, resume."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.blockwise import Silent
from compress.checkpoint import GUARD
from compress.errors import CompressError
from compress.layers import CompressedLinear
from compress.methods import names
from compress.prepare import prepare
from compress.recipe import Recipe
from compress.report import Report
from compress.run import run
from helpers import COMMON, FAMILIES, save_tiny, tiny_model, tiny_recipe, tiny_tokenizer

IDS = torch.arange(3, 60)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def compressed_layers(model: torch.nn.Module) -> dict[str, CompressedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", family)
    report = run(source, Recipe.from_dict(tiny_recipe()), tmp_path / "out")
    dense = sum(module.dense_bytes for module in report.modules)
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    model = compress.load(tmp_path / "out")
    layers = compressed_layers(model)
    packed = sum(
        tensor.numel() * tensor.element_size()
        for key, tensor in on_disk.items()
        if key.rpartition(".")[0] in layers and not key.endswith(".bias")
    )
    assert packed == sum(module.packed_bytes for module in report.modules)
    assert 0.2 <= 1 - packed / dense < 0.3, "ratio means measured bytes; tiny sizes round down a little"
    assert len(layers) == {"phi3": 4}.get(family, 7) * model.config.num_hidden_layers
    original = AutoModelForCausalLM.from_pretrained(source)
    for name, layer in layers.items():  # untouched tensors, biases among them, are the original's
        bias = original.get_submodule(name).bias
        assert (bias is None) == (layer.bias is None) and (bias is None or torch.equal(bias, layer.bias))
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    # Random weights hardly compress, but a swapped or transposed matrix would leave nothing of the original's logits.
    similarity = torch.cosine_similarity(logits(model).flatten(), logits(original).flatten(), dim=0)
    assert similarity > 0.4  # measured: 0.52 (qwen3) to 0.99; unrelated models give 0.0


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_what_lies_around_the_blocks_is_there_when_they_run(family: str, tmp_path: Path) -> None:
    """Learned positions (OPT) and a norm behind the embedding (Bloom): the model runs them again with every block."""
    sizes = {"opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "bloom": {"n_layer": 3, "n_head": 4}}[family]
    source = save_tiny(tmp_path / "model", family, **sizes)
    weights = [{"method": "none", "targets": ["*head"]}, {"method": "gptq", "bits": 8, "targets": ["*"]}]
    run(source, Recipe.from_dict({**tiny_recipe(), "weights": weights}), tmp_path / "out")
    want = logits(AutoModelForCausalLM.from_pretrained(source))
    assert (logits(compress.load(tmp_path / "out")) - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("method", names())
def test_nearly_full_size_is_nearly_lossless(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    key, most, least = ("ratio", 0.02, 0.6) if method in ("cospadi", "svd_llm") else ("bits", 8, 3)
    recipe = {**tiny_recipe(), "weights": {"method": method, key: most}}
    tight = run(tiny_llama, Recipe.from_dict(recipe), tmp_path / "a")
    recipe["weights"][key] = least
    loose = run(tiny_llama, Recipe.from_dict(recipe), tmp_path / "b")
    assert tight.summary()["mean_error"] < 0.7 * loose.summary()["mean_error"]
    model, original = compress.load(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tiny_llama)
    if key == "bits":  # measured: 0.011 (resq) to 0.021
        assert (logits(model) - logits(original)).norm() < 0.04 * logits(original).norm()
    compress.export_dense(tmp_path / "a", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert (logits(dense) - logits(model)).norm() < 0.03 * logits(model).norm()  # weights rounded to bf16


def test_reported_error_is_the_error_of_the_stored_layer(tiny_llama: Path, tiny_compressed: Path) -> None:
    """Block 0 sees the original inputs, so its first error can be measured from outside."""
    original, model = AutoModelForCausalLM.from_pretrained(tiny_llama), compress.load(tiny_compressed)
    report = Report.from_dict(json.loads((tiny_compressed / "report.json").read_text()))
    from compress.calibrate.data import load_texts, make_tokens

    tokens = make_tokens(load_texts("python-docs"), tiny_tokenizer(), samples=8, length=64)
    name = "model.layers.0.self_attn.q_proj"
    inputs = []
    original.get_submodule(name).register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, 1)))
    with torch.inference_mode():
        original(tokens.ids)
        x = torch.cat(inputs)
        want, got = original.get_submodule(name)(x), model.get_submodule(name)(x)
    assert float((got - want).norm() / want.norm()) == pytest.approx(report.modules[0].error, rel=1e-3)


def test_save_and_load_are_bit_exact(tiny_compressed: Path, tmp_path: Path) -> None:
    first = compress.load(tiny_compressed)
    first.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert torch.equal(logits(first), logits(second))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["transformers_weights"] == GUARD


def test_generation_is_the_same_before_saving_and_after_loading(tiny_llama: Path, tmp_path: Path) -> None:
    model = compress.compress_model(tiny_model("llama"), tiny_recipe(), tmp_path / "out", tokenizer=tiny_tokenizer())
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(IDS, **options)
    assert Report.from_dict(json.loads((tmp_path / "out" / "report.json").read_text())).model == "LlamaForCausalLM in memory"
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(IDS, **options)
    assert before.shape[1] > IDS.shape[1] and torch.equal(before, after)


def test_packed_tensors_keep_their_dtype_in_any_model_dtype(tiny_compressed: Path) -> None:
    model = compress.load(tiny_compressed, dtype=torch.float16)
    layer = compressed_layers(model)["model.layers.0.mlp.up_proj"]
    exact = compressed_layers(compress.load(tiny_compressed))["model.layers.0.mlp.up_proj"]
    assert model.model.norm.weight.dtype == torch.float16
    assert torch.equal(layer.dictionary, exact.dictionary) and torch.equal(layer.mask, exact.mask)


def test_plain_transformers_fails_loudly(tiny_compressed: Path) -> None:
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tiny_compressed)!r})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "import compress" in done.stderr


def test_untied_head_can_be_a_target(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "mistral")
    report = run(source, Recipe.from_dict(tiny_recipe(targets=["*down_proj", "lm_head"])), tmp_path / "out")
    assert report.modules[-1].name == "lm_head" and report.modules[-1].error < 0.5
    assert "lm_head" in compressed_layers(compress.load(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["multimodal", "without prefix"])
def test_blocks_under_other_names(kind: str, tmp_path: Path) -> None:
    """Gemma 3 with a vision tower of as many blocks, whose text model transformers stores elsewhere; Bloom's own files."""
    if kind == "multimodal":
        text = {**COMMON, **FAMILIES["gemma3_text"], "num_hidden_layers": 3, "layer_types": None}
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        sizes = {"text_config": text, "vision_config": {**vision, "image_size": 28, "patch_size": 14}}
        source = save_tiny(tmp_path / "model", "gemma3", **sizes, mm_tokens_per_image=4, image_token_index=250)
        before = "language_model.model.layers.0.mlp.up_proj.weight"
    else:
        source = save_tiny(tmp_path / "model", "bloom", n_layer=3, n_head=4)
        stored = load_file(source / "model.safetensors")
        save_file(
            {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}, source / "model.safetensors"
        )
        before = "h.0.mlp.dense_h_to_4h.weight"
    assert before in load_file(source / "model.safetensors")
    weights = [{"method": "none", "targets": ["*head"]}, {"method": "gptq", "bits": 8, "targets": ["*"]}]
    recipe = Recipe.from_dict({**tiny_recipe(), "weights": weights})
    tower = "left as they are: 21 linears outside the decoder's blocks (model.vision_tower)"  # 3 blocks of 6, 3 that pool
    assert (tower in prepare(source, recipe, "cpu").plan.notes) == (kind == "multimodal")
    report = run(source, recipe, tmp_path / "out")
    assert len(report.modules) == 3 * (7 if kind == "multimodal" else 4)
    model, original = compress.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source)
    want = logits(original)
    assert (logits(model) - want).norm() < 0.04 * want.norm()  # measured: 0.021
    mine, theirs = model.state_dict(), original.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items() if name in mine and "vision" in name)
    compress.export_dense(tmp_path / "out", tmp_path / "dense")
    dense, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert (logits(dense.float()) - want).norm() < 0.05 * want.norm()


def test_mixture_of_experts_is_left_alone(tmp_path: Path) -> None:
    FAMILIES["mixtral"] = {"num_local_experts": 4}
    try:
        source = save_tiny(tmp_path / "model", "mixtral")
    finally:
        del FAMILIES["mixtral"]
    notes: list[str] = []

    class Notes(Silent):
        note = staticmethod(notes.append)

    run(source, Recipe.from_dict(tiny_recipe()), tmp_path / "out", progress=Notes())
    assert any("mixture-of-experts" in note for note in notes)
    model, original = compress.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source)
    assert len(compressed_layers(model)) == 4 * 3
    mine, theirs = model.state_dict(), original.state_dict()
    experts = [key for key in theirs if "experts" in key or "gate" in key]
    assert experts and all(torch.equal(mine[key], theirs[key]) for key in experts)


def test_original_inputs_differ_only_after_the_first_block(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    one = run(tiny_llama, Recipe.from_dict(recipe), tmp_path / "a")
    recipe["calibration"]["inputs"] = "original"
    two = run(tiny_llama, Recipe.from_dict(recipe), tmp_path / "b")
    errors = [(a.error, b.error) for a, b in zip(one.modules, two.modules, strict=True)]
    assert all(a == b for a, b in errors[:7]) and all(a != b for a, b in errors[7:])


def tensors_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


def test_killed_runs_resume_with_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """SIGKILL after the first block, within a later one, and while shards are written; then the same command."""
    recipe = tiny_recipe(iterations=12, refits=40)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    run(tiny_llama, Recipe.from_dict(recipe), tmp_path / "whole", max_shard_bytes=100_000)
    code = f"""
from compress.recipe import Recipe
from compress.run import run
run({str(tiny_llama)!r}, Recipe.load({str(tmp_path / "r.yaml")!r}), {str(tmp_path / "out")!r}, max_shard_bytes=100_000)
"""
    staging = tmp_path / ".out.partial"
    marks = [staging / "run.json", staging / "block-00000.safetensors", staging / "block-00001.json", staging / "whole"]
    killed = 0
    for mark in marks:
        process = subprocess.Popen([sys.executable, "-P", "-c", code], stderr=subprocess.DEVNULL)
        while process.poll() is None and not mark.exists():
            time.sleep(0.0005)
        process.kill()
        process.wait()
        killed += process.returncode == -9
        assert process.returncode == 0 or not (tmp_path / "out").exists(), "the output appeared before it was complete"
    assert killed >= 3
    if not (tmp_path / "out").exists():
        subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "whole")
    assert not staging.exists()


def test_another_recipe_or_model_may_not_continue_a_run(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    recipe = Recipe.from_dict(tiny_recipe())
    with monkeypatch.context() as patched:
        patched.setattr("compress.checkpoint.assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_llama, recipe, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "block-00002.safetensors").exists()
    with pytest.raises(CompressError, match="another recipe"):
        run(tiny_llama, Recipe.from_dict(tiny_recipe(ratio=0.3)), tmp_path / "out")
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    with pytest.raises(CompressError, match="another model"):
        run(other, recipe, tmp_path / "out")
    run(tiny_llama, recipe, tmp_path / "out")
    with pytest.raises(CompressError, match="finished run of this recipe"):
        run(tiny_llama, recipe, tmp_path / "out")
