"""Codes of a group: nothing clipped, every error within half a step of the grid that is stored, a search that pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cache_helpers import states
from compress.cache.quantizer import EIGHT_BITS, Grid, Rounded, decode, dequantize, encode, from_bytes, parts_of, quantize


def read(rounded: Rounded, grid: Grid) -> Tensor:
    back = dequantize(rounded.codes, rounded.scale, rounded.minimum, grid)
    assert torch.equal(back, rounded.values)
    return back


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, EIGHT_BITS])
def test_every_error_is_within_half_a_step_on_the_rounded_grid(bits: int, dtype: torch.dtype) -> None:
    few = dtype == EIGHT_BITS  # a span of 2^16
    x = torch.randn(500, 24) * torch.logspace(0 if few else -2, 2 if few else 3, 500)[:, None] + 20 * torch.randn(500, 1)
    grid = Grid(dtype, 1.0 if not few else torch.tensor(0.5), 1.0 if not few else torch.tensor(3.0))
    rounded = quantize(x, bits, grid)
    assert rounded.codes.dtype == torch.uint8 and rounded.scale.dtype == rounded.minimum.dtype
    assert rounded.scale.dtype == (torch.uint8 if few else dtype)
    assert int(rounded.codes.max()) == 2**bits - 1 and int(rounded.codes.min()) == 0
    step, start = (
        from_bytes(stored, dtype).float() * unit
        for stored, unit in ((rounded.scale, grid.scale_unit), (rounded.minimum, grid.minimum_unit))
    )
    assert ((read(rounded, grid) - x).abs() <= step * (0.5 + 1e-4) + 1e-5).all()
    ideal = (x.amax(-1) - start.squeeze(-1)) / (2**bits - 1)
    smallest = 2.0**-9 if few else 0
    assert (step.squeeze(-1) <= ideal * (1 + torch.finfo(dtype).eps) + 1e-7 + smallest).all(), (
        "rounded up by more than an ulp"
    )


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
    x, grid = torch.randn(2000, 32), Grid(dtype, 0.5, 0.5)
    errors = [float((read(quantize(x, bits, grid, fit), grid) - x).square().mean()) for fit in (0, 6)]
    assert errors[1] < gain * errors[0] or (dtype == EIGHT_BITS and bits == 8), errors


def test_more_ranges_are_never_worse() -> None:
    x, grid = torch.randn(500, 32).exp(), Grid(torch.float32)
    errors = [(quantize(x, 2, grid, fit).values - x).square().sum(-1) for fit in (1, 7)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].sum() < errors[0].sum()


def test_parts_are_coded_apart() -> None:
    x, grid = states(5), Grid(torch.bfloat16)
    packed, affine = encode(x, parts_of(64, 3, 6, 8), torch.bfloat16)
    assert packed.shape[-1] == 56 * 3 // 8 + 6 and affine.shape[-1] == 4
    low, high = (read(quantize(part, bits, grid), grid) for part, bits in ((x[..., :56], 3), (x[..., 56:], 6)))
    assert torch.equal(decode(packed, affine, parts_of(64, 3, 6, 8)), torch.cat([low, high], dim=-1))
