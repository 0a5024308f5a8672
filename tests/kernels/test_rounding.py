"""Codes of a group: nothing clipped, every error within half a step of the grid that is stored, a search that pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.kernels.affine_groups import EIGHT_BITS, affine_values
from compress.kernels.rounding import Grid, Rounded, quantize, to_grid


def read(rounded: Rounded, grid: Grid) -> Tensor:
    stored = torch.cat([rounded.scale, rounded.minimum], dim=-1)[None, None]
    units = None
    if grid.dtype == EIGHT_BITS:
        units = torch.tensor([[[float(grid.scale_unit), float(grid.minimum_unit)]]])
    scale, minimum = affine_values(stored, units)
    back = rounded.codes * scale[0, 0] + minimum[0, 0]
    assert torch.equal(back, rounded.values)
    return back


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_error_is_within_half_a_step_on_the_rounded_grid(bits: int, dtype: torch.dtype) -> None:
    x, grid = torch.randn(500, 24) * torch.logspace(-2, 3, 500)[:, None] + 20 * torch.randn(500, 1), Grid(dtype)
    rounded = quantize(x, bits, grid)
    assert rounded.codes.dtype == torch.uint8 and rounded.scale.dtype == rounded.minimum.dtype == dtype
    assert int(rounded.codes.max()) == 2**bits - 1 and int(rounded.codes.min()) == 0
    step = rounded.scale.float()
    assert ((read(rounded, grid) - x).abs() <= step * (0.5 + 1e-4) + 1e-5).all()
    ideal = (x.amax(-1) - rounded.minimum.float().squeeze(-1)) / (2**bits - 1)
    assert (step.squeeze(-1) <= ideal * (1 + torch.finfo(dtype).eps) + 1e-7).all(), "rounded up by more than an ulp"


@pytest.mark.parametrize(("bits", "loss"), [(2, 1.05), (3, 1.15), (4, 1.5)])
def test_eight_bit_scales_lose_little(bits: int, loss: float) -> None:
    """Against 16 bits, in units that are not the numbers' own and over a thousandfold range of scales."""
    x = torch.randn(2000, 32) * torch.logspace(-1, 1, 2000)[:, None]
    grid = Grid(EIGHT_BITS, torch.tensor(0.1), torch.tensor(0.3))
    errors = [
        ((read(quantize(x, bits, g), g) - x).square().mean(-1) / x.square().mean(-1)).mean()
        for g in (grid, Grid(torch.bfloat16))
    ]
    assert errors[0] < loss * errors[1], errors


def test_eight_bits_take_the_best_of_four_roundings() -> None:
    x, grid = torch.randn(500, 32), Grid(EIGHT_BITS, torch.tensor(0.1), torch.tensor(0.3))
    error = (quantize(x, 2, grid).values - x).square().sum(-1, keepdim=True)
    low, high, equal = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), []
    for down in (0, -1):
        start = to_grid(low, grid, grid.minimum_unit, down).float() * grid.minimum_unit
        for up in (0, 1):
            step = to_grid((high - start) / 3, grid, grid.scale_unit, up).float() * grid.scale_unit
            other = (((x - start) / step).round().clamp(0, 3) * step + start - x).square().sum(-1, keepdim=True)
            assert (error <= other * (1 + 1e-5)).all()
            equal.append((other <= error * (1 + 1e-5)).any())
    assert all(equal), "each of the four is best somewhere"


def test_eight_bits_hold_what_is_beyond_their_end() -> None:
    grid = Grid(EIGHT_BITS, 1.0, 1.0)
    x = torch.stack([torch.linspace(-1e4, 1e4, 16), torch.zeros(16), torch.full((16,), 3.0)])
    back = read(quantize(x, 2, grid), grid)
    assert back.isfinite().all() and torch.equal(back[1:], x[1:])


def test_constant_vectors_come_back() -> None:
    x, grid = torch.tensor([0.0, -3.5, 100.1, 1e-3])[:, None].expand(-1, 16), Grid(torch.bfloat16)
    for fit in (0, 4):
        back = read(quantize(x, 4, grid, fit), grid)
        assert torch.equal(back[:2], x[:2])  # bf16 holds them
        torch.testing.assert_close(back, x, rtol=1e-3 if fit == 0 else 4e-3, atol=0)
        rounded = quantize(x[:2], 4, grid, fit)
        assert not rounded.codes.any() and not rounded.scale.any()


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.8), (3, 0.95), (8, 1.02)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, EIGHT_BITS])
def test_a_search_leaves_less_error(bits: int, gain: float, dtype: torch.dtype) -> None:
    """Squared error of normal groups against the extremes; with many levels there is nothing to gain."""
    x, grid = torch.randn(2000, 32), Grid(dtype, 0.5, 0.5) if dtype == EIGHT_BITS else Grid(dtype)
    errors = [float((read(quantize(x, bits, grid, fit), grid) - x).square().mean()) for fit in (0, 6)]
    assert errors[1] < gain * errors[0] or (dtype == EIGHT_BITS and bits == 8), errors


def test_more_ranges_are_never_worse() -> None:
    x, grid = torch.randn(500, 32).exp(), Grid(torch.float32)
    errors = [(quantize(x, 2, grid, fit).values - x).square().sum(-1) for fit in (1, 7)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].sum() < errors[0].sum()
