"""A reordered model is the same function, in families whose stream cannot be rotated too; the largest channels are last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.blockwise import Silent
from compress.calibrate.data import load_texts, make_tokens
from compress.errors import CompressError
from compress.model import build_skeleton, is_tied, materialise
from compress.moments import gather
from compress.prepare import prepare
from compress.recipe import Recipe
from compress.reorder import FAMILIES, ReorderedSource
from compress.run import run
from compress.source import open_source
from helpers import FAMILIES as TINY
from helpers import save_tiny, tiny_recipe, tiny_tokenizer

IDS = torch.arange(3, 60)[None]
TINY.setdefault("gemma2", {**TINY["gemma3_text"]})
TINY.setdefault("gemma", {"head_dim": 16})


def resq(**options: object) -> Recipe:
    return Recipe.from_dict({**tiny_recipe(), "weights": {"method": "resq", "stream_basis": "order", **options}})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_reordering_keeps_the_function(family: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", family)
    source, model = open_source(path), build_skeleton(path)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    reordered = ReorderedSource(source, model, order)
    tied = is_tied(model)
    materialise(model, reordered, "model." if tied else "", torch.float32, torch.device("cpu"))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    want = logits(AutoModelForCausalLM.from_pretrained(path))
    assert (logits(model) - want).norm() < 1e-5 * want.norm()
    norms = [name for name in source.tensors if "norm" in name and ".self_attn." not in name]
    assert set(norms) < set(reordered.changed())
    assert not any("q_norm" in name or "k_norm" in name for name in reordered.changed())


def test_largest_channels_come_last(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", "gemma3_text")
    tokens = make_tokens(load_texts("python-docs"), tiny_tokenizer(), samples=8, length=64)
    moments = gather(prepare(path, resq()), tokens, Silent(), "order")
    model, energies = AutoModelForCausalLM.from_pretrained(path), []
    for layer in model.model.layers:
        for reader in (layer.self_attn.q_proj, layer.mlp.gate_proj):
            reader.register_forward_pre_hook(lambda m, args: energies.append(args[0].double().square().sum(dim=(0, 1))))
    with torch.inference_mode():
        model(tokens.ids)
    want = sum(energy / energy.sum() for energy in energies) / len(energies)
    assert torch.allclose(moments.stream, want, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2"])
def test_resq_on_a_model_that_cannot_be_rotated(family: str, tmp_path: Path) -> None:
    """Near-lossless widths give near the original's logits, so every folding meets its inverse; then 4 bits, saved."""
    path = save_tiny(tmp_path / "model", family)
    want = logits(AutoModelForCausalLM.from_pretrained(path))
    run(path, resq(bits=8, activation_bits=8), tmp_path / "eight")
    eight = logits(compress.load(tmp_path / "eight"))
    assert (eight - want).norm() < 0.05 * want.norm()
    run(path, resq(bits=4, activation_bits=4, rounded_inputs=True), tmp_path / "four")
    four = logits(compress.load(tmp_path / "four"))
    assert (eight - want).norm() < 0.3 * (four - want).norm()
    spec = compress.load(tmp_path / "four").model.layers[0].self_attn.q_proj.spec
    assert spec["high_features"] == 8 and spec["hadamard"]


def test_fused_projections_have_no_heads_to_fold(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", "phi3")
    with pytest.raises(CompressError, match=r"no v_proj of its own; use --set weights.heads_basis=none"):
        run(path, resq(), tmp_path / "out")
    run(path, resq(heads_basis="none"), tmp_path / "out")
    assert torch.isfinite(logits(compress.load(tmp_path / "out"))).all()


@pytest.mark.parametrize(("family", "heads"), [("gemma3_text", "hadamard"), ("phi3", "none")])
def test_quarot_online(family: str, heads: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", family)
    recipe = {"method": "quarot", "online": True, "bits": 8, "heads_basis": heads}
    run(path, Recipe.from_dict({**tiny_recipe(), "weights": recipe}), tmp_path / "out")
    want = logits(AutoModelForCausalLM.from_pretrained(path))
    assert (logits(compress.load(tmp_path / "out")) - want).norm() < 0.05 * want.norm()
