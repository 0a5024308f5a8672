"""A rotated model is the same function; what it is rotated into is what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.bases import rotation_bases
from compress.blockwise import Silent
from compress.calibrate.data import load_texts, make_tokens
from compress.errors import CompressError
from compress.layers import build
from compress.model import build_skeleton, materialise
from compress.moments import Moments, gather
from compress.orthonormal import hadamard_basis, pca_basis, random_orthogonal
from compress.prepare import Prepared, prepare
from compress.recipe import Recipe
from compress.rotation import (
    FAMILIES,
    RotatedSource,
    Rotation,
    Wanted,
    final_norm_spec,
)
from compress.run import run
from compress.source import open_source
from helpers import save_tiny, tiny_recipe, tiny_tokenizer

IDS = torch.arange(3, 60)[None]
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]


def recipe_for(method: str, **options: object) -> Recipe:
    data = tiny_recipe()
    return Recipe.from_dict({**data, "weights": {"method": method, **options}})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize(("family", "tied"), CASES, ids=str)
def test_rotation_keeps_the_function(family: str, tied: bool, tmp_path: Path) -> None:
    """head_dim 32 makes o_proj 128 x 64; gains, biases and the final norm are random (tests/helpers.py)."""
    path = save_tiny(tmp_path / "model", family, tie_word_embeddings=tied, head_dim=32)
    source, model = open_source(path), build_skeleton(path)
    generator = torch.Generator().manual_seed(3)
    heads = {
        index: torch.stack([random_orthogonal(32, generator) for _ in range(2)]) for index in (0, 2)
    }  # block 1 keeps its heads
    order = {1: torch.randperm(96, generator=generator)}
    rotated = RotatedSource(source, model, Rotation(random_orthogonal(64, generator), heads, order))
    norm = final_norm_spec(model, rotated)
    assert (norm is not None) == tied
    if norm:
        with torch.device("meta"):
            model.set_submodule(norm[0], build(norm[1]))
    materialise(model, rotated, "model." if tied else "", torch.float32, torch.device("cpu"))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    want = logits(AutoModelForCausalLM.from_pretrained(path))
    assert (logits(model) - want).norm() < 1e-4 * want.norm()  # measured: at most 3e-6
    assert set(rotated.changed()) >= {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    if "q_proj.bias" in str(source.tensors):
        assert torch.equal(
            rotated.read("model.layers.0.self_attn.q_proj.bias"), source.read("model.layers.0.self_attn.q_proj.bias")
        )


def prepared_and_moments(tmp_path: Path) -> tuple[Prepared, Moments]:
    prepared = prepare(save_tiny(tmp_path / "model", "qwen2"), recipe_for("resq"))
    tokens = make_tokens(load_texts("python-docs"), tiny_tokenizer(), samples=8, length=64)
    return prepared, gather(prepared, tokens, Silent(), hidden=True)


def test_moments_are_those_of_the_model(tmp_path: Path) -> None:
    """Against a whole-model forward with hooks of its own."""
    prepared, moments = prepared_and_moments(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = make_tokens(load_texts("python-docs"), tiny_tokenizer(), samples=8, length=64)
    seen = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda m, a, y: seen.append((y / m.weight).flatten(0, 1).double()))
    values = []
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, a, y: values.append(y.flatten(0, 1).double()))
    with torch.inference_mode():
        cache = model(tokens.ids).past_key_values
    want = sum(x.T @ x for x in seen) / sum(len(x) for x in seen)
    assert torch.allclose(moments.stream, want, rtol=1e-3, atol=1e-5)
    v = values[0].view(-1, 2, 16)
    assert torch.allclose(moments.values[1], torch.einsum("thd,the->hde", v, v) / len(v), rtol=1e-3, atol=1e-5)
    keys = cache.layers[2].keys.double()
    want = torch.einsum("bhtd,bhte->hde", keys, keys) / (keys.shape[0] * keys.shape[2])
    assert torch.allclose(moments.keys[2], want, rtol=1e-3, atol=1e-5)
    assert prepared.model.config._attn_implementation == "sdpa"


def test_pca_basis_puts_the_energy_last() -> None:
    x = torch.randn(500, 24).double() @ (torch.randn(24, 24).double() * torch.logspace(0, -2, 24)[:, None])
    moment = x.T @ x / 500
    basis = pca_basis(moment, 8, torch.Generator().manual_seed(0))
    assert torch.allclose(basis.T @ basis, torch.eye(24).double(), atol=1e-12)
    energy = (basis.T @ moment @ basis).diagonal()
    top = torch.linalg.eigvalsh(moment)[-8:].sum()
    assert torch.allclose(energy[-8:].sum(), top)
    assert torch.equal(basis, pca_basis(moment, 8, torch.Generator().manual_seed(0)))
    assert energy[-8:].std() < 0.5 * torch.linalg.eigvalsh(moment)[-8:].std()  # spread inside the part
    with pytest.raises(ValueError, match="NaN"):
        pca_basis(moment * torch.nan, 8, None)


def test_weights_can_share_in_the_choice(tmp_path: Path) -> None:
    prepared, moments = prepared_and_moments(tmp_path)
    plain = Wanted("pca", 8, "pca", 2, seed=1)
    mixed = Wanted("pca", 8, "pca", 2, weight_share=0.5, seed=1)
    one, two = (rotation_bases(prepared, wanted, moments) for wanted in (plain, mixed))
    assert one.keys() == two.keys() == {"stream", "heads.0", "heads.1", "heads.2"}
    for name, basis in two.items():
        assert not torch.allclose(basis, one[name])
        assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[-1]).double().expand_as(basis), atol=1e-10)


def test_hadamard_basis_has_random_signs() -> None:
    first, second = (hadamard_basis(24, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.allclose(first.T @ first, torch.eye(24).double()) and not torch.equal(first, second)
    assert torch.allclose(first.abs(), torch.full_like(first, 24**-0.5))


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "mixtral"])
def test_other_families_are_refused_by_name(family: str, tmp_path: Path) -> None:
    from helpers import FAMILIES as TINY

    TINY.setdefault("mixtral", {"num_local_experts": 4})
    path = save_tiny(tmp_path / "model", family)
    TINY.pop("mixtral")
    from compress.run import run

    with pytest.raises(CompressError, match=f"{family} models cannot be rotated"):
        run(path, recipe_for("resq"), tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_a_stored_copy_of_a_tied_head_does_not_stay_behind(tmp_path: Path) -> None:
    """As Qwen3-0.6B has it: transformers would untie an embedding that was rotated and a head that was not."""
    path, out = save_tiny(tmp_path / "model", "qwen3", tie_word_embeddings=True), tmp_path / "out"
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_for("resq", bits=8, activation_bits=16)
    assert "left out: lm_head.weight, a copy of model.embed_tokens.weight" in prepare(path, recipe, "cpu").plan.notes
    run(path, recipe, out)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    original, ours = (logits(AutoModelForCausalLM.from_pretrained(side)) for side in (path, out))
    assert torch.linalg.norm(ours - original) < 0.05 * torch.linalg.norm(original)
    tensors["lm_head.weight"][3, 2] += 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"ties lm_head\.weight .* set tie_word_embeddings"):
        run(path, recipe_for("rtn"), tmp_path / "refused")


def test_rules_must_agree_on_the_rotation(tiny_llama: Path, tmp_path: Path) -> None:
    from compress.run import run

    rules = [{"method": "resq", "targets": ["*q_proj"]}, {"method": "quarot"}]
    with pytest.raises(CompressError, match="different rotations"):
        run(tiny_llama, Recipe.from_dict({**tiny_recipe(), "weights": rules}), tmp_path / "out")
