"""Uniform quantization: the grid, the search, the storage of scales."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from compress import quantizer
from compress.quantizer import (
    SCALE_DTYPE,
    Group,
    dequantize,
    groups_of,
    quantize,
    round_to_nearest,
    search_scale,
    search_scales,
)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_on_the_grid_come_back_exactly(bits: int) -> None:
    """Codes over the whole range times a storable scale, of either sign."""
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (6, 40))
    codes[:, 0] = -half  # the range is used to its end
    scale = torch.tensor([[0.5], [-0.25], [2.0], [1.0], [-1.0], [0.125]])
    weight = codes * scale
    got, scales = round_to_nearest(weight, groups_of(40, bits, 0))
    assert torch.equal(dequantize(got, scales, groups_of(40, bits, 0)), weight)
    assert torch.equal(quantize(weight, scale, bits), codes.float())


@pytest.mark.parametrize("group_size", [0, 16, 24])
def test_groups_cover_all_columns_once(group_size: int) -> None:
    groups = groups_of(40, 4, group_size, start=8)
    assert groups[0].start == 8 and groups[-1].stop == 48
    assert all(a.stop == b.start for a, b in pairwise(groups))
    assert groups_of(0, 4, group_size) == []


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searching_beats_the_largest_weight(bits: int) -> None:
    weight = torch.randn(50, 64)
    errors = []
    for steps in (1, 24):
        groups = groups_of(64, bits, 0)
        codes, scales = round_to_nearest(weight, groups, steps=steps)
        errors.append(float((dequantize(codes, scales, groups) - weight).norm()))
    assert errors[1] < 0.95 * errors[0]


def test_scales_are_what_storage_holds() -> None:
    scale = search_scale(torch.randn(30, 32), 4)
    assert torch.equal(scale, scale.to(SCALE_DTYPE).float())
    assert (scale < 0).any() and (scale > 0).any()  # the sign gives the longer side of the range to the larger weights


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_groups_searched_together_get_the_scales_of_each_alone(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and widths that change from run to run, and rows that come a few at a time."""
    groups = [*groups_of(40, 4, 16), *groups_of(32, 4, 16, start=40), Group(72, 88, 8)]
    weight, importance = torch.randn(23, 88), torch.rand(88)
    alone = [
        search_scale(weight[:, g.start : g.stop], g.bits, power=power, importance=importance[g.start : g.stop])
        for g in groups
    ]
    for at_once in (1, 100, 1 << 18):
        monkeypatch.setattr(quantizer, "_AT_ONCE_ON_CPU", at_once)
        assert torch.equal(search_scales(weight, groups, power=power, importance_I=importance), torch.cat(alone, dim=1))


def test_importance_protects_the_columns_it_names() -> None:
    weight = torch.cat([torch.randn(20, 31), 20 * torch.randn(20, 1)], dim=1)
    importance = torch.ones(32)
    importance[31] = 0
    plain, aware = search_scale(weight, 4), search_scale(weight, 4, importance=importance)
    assert (aware.abs() < 0.6 * plain.abs()).float().mean() > 0.7  # measured: 0.8


def test_zero_weights_have_zero_codes() -> None:
    codes, scales = round_to_nearest(torch.zeros(3, 16), groups_of(16, 4, 8))
    assert not codes.any() and torch.isfinite(scales).all()
