"""Weights that are zero or tiny, and inputs that are zero: every method answers, and no figure is NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.blockwise import Silent
from compress.errors import CompressError
from compress.layers import build
from compress.linalg import SecondMoment, damped
from compress.methods import Site, cospadi, load, names, svd_llm
from compress.recipe import Recipe
from compress.run import run
from helpers import save_tiny, tiny_recipe

CASES = [(name, {}) for name in names()] + [("cospadi", {"solver": "ksvd", "iterations": 3}), ("cospadi", {"refits": 0})]
UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(300, 64) * torch.logspace(0, -1, 64)
    return torch.randn(96, 64), (x.T @ x / len(x)).double()


def stored(name: str, options: dict, weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """What a layer compressed by a method multiplies by; fails on a packed tensor that is not finite."""
    method = load(name)
    config = method.Config(**options)
    spec = {**method.plan(Site(64, 96), config), "in_features": 64, "out_features": 96, "bias": False}
    tensors = method.compress(weight, SecondMoment(gram), spec, config)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
    layer = build(spec)
    layer.load_state_dict(tensors)
    return layer.dense_weight()


@pytest.mark.parametrize("options", [{"ratio": 0.3, "value_bits": 8}, {"ratio": 0.6, "value_bits": 4}], ids=str)
def test_fewer_different_tokens_than_inputs(options: dict) -> None:
    """As in the first block, with a direction that all share: what fp32 rounds there is more than the damping covers."""
    tokens = torch.randn(200, 256) + 30 * torch.randn(256)
    x = tokens[torch.randint(200, (16384,))]
    weight, gram = torch.randn(64, 256), sum((part.T @ part).double() for part in x.split(2048)) / len(x)
    config = cospadi.Config(dictionary="identity+learned", **options)
    spec = {**cospadi.plan(Site(256, 64), config), "in_features": 256, "out_features": 64, "bias": False}
    layer = build(spec)
    layer.load_state_dict(cospadi.compress(weight, SecondMoment(gram), spec, config))
    assert SecondMoment(gram).relative_error(weight, layer.dense_weight()) < 0.02


def test_damping_gives_way_where_rounding_is_larger() -> None:
    gram, eye = problem()[1], torch.eye(64, dtype=torch.float64)
    assert torch.equal(damped(gram, 1e-6), gram + 1e-6 * gram.diagonal().mean() * eye)
    rounded = gram.clone()
    rounded[3] = rounded[:, 3] = 0
    rounded[3, 3] = -5e-6 * gram.diagonal().mean()
    assert torch.linalg.eigvalsh(damped(rounded, 1e-6))[0] > 0


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_zero_weight_stays_zero(name: str, options: dict) -> None:
    weight, gram = problem()
    zero = torch.zeros_like(weight)
    assert torch.equal(stored(name, options, zero, gram), zero)
    assert SecondMoment(gram).relative_error(zero, zero) == 0


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1e25], ids=["tiny", "huge"])
def test_the_size_of_a_weight_does_not_matter(name: str, options: dict, scale: float) -> None:
    weight, gram = problem()
    plain = SecondMoment(gram).relative_error(weight, stored(name, options, weight, gram))
    scaled = SecondMoment(gram).relative_error(weight * scale, stored(name, options, weight * scale, gram))
    # measured: within 5 %, and 1.35 times for the tiny scale searches, whose squared errors vanish in fp32
    assert 0 < scaled < 1.5 * plain


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_dead_rows_do_not_hurt_the_others(name: str, options: dict) -> None:
    weight, gram = problem()
    weight[:40] = 0
    weight[40:48] *= 1e-25
    got = stored(name, options, weight, gram)
    assert got[:40].abs().max() < 1e-6 * got.abs().max()
    assert SecondMoment(gram).relative_error(weight, got) < 0.4  # measured: 0.002 to 0.14, 0.45 with dead atoms in ksvd


def test_weights_below_the_smallest_scale_become_zero() -> None:
    weight, gram = problem()
    for name in ("rtn", "gptq"):
        assert torch.equal(stored(name, {}, weight * 1e-42, gram * 1e-20), torch.zeros_like(weight))


def damaged(path: Path, *zeroed: str) -> Path:
    save_tiny(path)
    tensors = load_file(path / "model.safetensors")
    for name in zeroed:
        tensors[f"{name}.weight"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(
    "weights", [{"method": m} for m in names()] + [{"method": "cospadi", "solver": "ksvd", "iterations": 2}], ids=str
)
def test_a_dead_mlp_does_not_end_a_run(weights: dict, tmp_path: Path) -> None:
    """A zero up_proj compresses to zero; down_proj behind it sees nothing and keeps an approximation of its weight."""
    notes = Notes()
    report = run(
        damaged(tmp_path / "model", UP),
        Recipe.from_dict({**tiny_recipe(), "weights": weights}),
        tmp_path / "out",
        progress=notes,
    )
    errors = {module.name: module.error for module in report.modules}
    assert errors[UP] == 0 and 0 < errors[DOWN] < 0.9
    assert [text for text in notes.texts if "zeros" in text] == [
        f"{DOWN} saw only zeros on the calibration text: its error is that of its weight alone"
    ]
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert compress.load(tmp_path / "out").get_submodule(UP).dense_weight().eq(0).all()


def test_an_unseen_layer_gets_the_approximation_of_its_own_weight(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({**tiny_recipe(), "weights": {"method": "svd_llm", "targets": ["*down_proj"]}})
    run(damaged(tmp_path / "model", UP), recipe, tmp_path / "out")
    weight = load_file(tmp_path / "model" / "model.safetensors")[f"{DOWN}.weight"]
    got = compress.load(tmp_path / "out").get_submodule(DOWN)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    rank = got.spec["rank"]
    want = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert (got.dense_weight() - want).norm() < 0.01 * want.norm()  # bf16 factors


@pytest.mark.parametrize("method", [cospadi, svd_llm], ids=["cospadi", "svd_llm"])
def test_what_is_not_finite_is_named_and_never_stored(method, tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    whole = method.compress

    def broken(*arguments: object) -> dict[str, torch.Tensor]:
        tensors = whole(*arguments)
        key = next(iter(tensors))
        return {**tensors, key: tensors[key] * torch.nan}

    monkeypatch.setattr(method, "compress", broken)
    recipe = Recipe.from_dict({**tiny_recipe(), "weights": {"method": method.__name__.rpartition(".")[2]}})
    with pytest.raises(CompressError, match=r"model\.layers\.0\.self_attn\.q_proj: compressing it gave a NaN"):
        run(tiny_llama, recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bases_that_share_with_weights_survive_dead_values(tmp_path: Path) -> None:
    recipe = {**tiny_recipe(), "weights": {"method": "resq", "weight_share": 0.5}}
    path = damaged(tmp_path / "model", "model.layers.0.self_attn.v_proj")
    report = run(path, Recipe.from_dict(recipe), tmp_path / "out")
    assert all(module.error < 1 for module in report.modules)
