"""The rounding of a group: asymmetric codes between a minimum and a scale of few bits, as pure functions.

A group is a run of numbers x that share a scale and a minimum. n numbers at b bits:

    minimum = min x        scale = (max x - minimum) / (2^b - 1)        code = round((x - minimum) / scale)
    read back as minimum + scale code, so every error is at most scale / 2

**The grid.** Scale and minimum are stored in 16 bits (fp16 or bf16) or in 8 (e4m3, in units that belong to a head), and
codes are taken on the rounded grid. In 16 bits the minimum is rounded DOWN, the scale is computed from that minimum and
rounded UP: nothing is clipped (rounded to nearest, the ends of the range would be off the grid by up to half a step of 8
bits), and a step is at most 2^-7 wider, twice that where the minimum is not exact. It moves by 2^-7 |minimum|, little unless
all numbers lie far from 0 on one side; keys are stored less a centre for that reason. In 8 bits the minimum may go to the
nearest or down and the scale to the nearest or up, and the pair of least squared error is taken. At 2 bits that is as good
as 16 bits: .152 against .156 for 32 normal numbers, .180 with both rounded outward.

**The search.** At 2 bits the extremes waste the grid: for 32 normal numbers the best four levels span 0.7 of their range
and leave 0.65 of the squared error. With `fit` > 0 so many shrunken ranges are tried, each improved by the least-squares
line through its codes; the best one is rounded to nearest. The storage is the same. Cost: 2 `fit` roundings of new states.

Nothing is shared between groups: rounding them together or one by one gives the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels.affine_groups import EIGHT_BITS

_EITHER_WAY = [(0, 0), (0, 1), (-1, 0), (-1, 1)]  # minimum to the nearest or down, scale to the nearest or up
NARROWEST = 0.55  # of the whole range; a normal group of 32 at 2 bits is best near 0.7, one of 128 near 0.6


class Grid(NamedTuple):
    """How scales and minima are stored: a dtype, and what 1.0 stands for in it (fp32, broadcast against them)."""

    dtype: torch.dtype
    scale_unit: Tensor | float = 1.0
    minimum_unit: Tensor | float = 1.0


class Rounded(NamedTuple):
    """Codes (uint8, as x), scale and minimum `[..., 1]` (uint8 for 8 bits), and the fp32 values that they stand for."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    values: Tensor


def quantize(x: Tensor, bits: int, grid: Grid, fit: int = 0) -> Rounded:
    """Round every group along the last dimension.

    A constant group gets scale 0 and codes 0 where the grid holds its value; elsewhere the tiny step of the gap.
    """
    x = x.float()
    levels = (1 << bits) - 1
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale, start = best_range(x, levels, fit) if fit else (None, low)
    outward = [(0, 0)] if fit else [(-1, 1)]
    candidates = []
    for down, up in _EITHER_WAY if grid.dtype == EIGHT_BITS else outward:
        minimum = to_grid(start, grid, grid.minimum_unit, outward=down)
        step = (high - minimum.float() * grid.minimum_unit) / levels if scale is None else scale
        candidates.append((to_grid(step, grid, grid.scale_unit, outward=up), minimum))
    return _least_error(x, levels, grid, candidates)


def _least_error(x: Tensor, levels: int, grid: Grid, candidates: list[tuple[Tensor, Tensor]]) -> Rounded:
    """The scale and minimum on the grid, of several, with the least squared error."""
    best, least = None, None
    for scale, minimum in candidates:
        step, start = scale.float() * grid.scale_unit, minimum.float() * grid.minimum_unit
        codes = _nearest(x, step, start, levels)
        found = codes, as_bytes(scale), as_bytes(minimum), codes * step + start
        error = (found[3] - x).square().sum(dim=-1, keepdim=True) if len(candidates) > 1 else None
        if best is None:
            best, least = found, error
        else:
            better = error < least
            best, least = tuple(map(torch.where, [better] * 4, found, best)), torch.where(better, error, least)
    return Rounded(best[0].to(torch.uint8), *best[1:])


def best_range(x: Tensor, levels: int, fit: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum `[..., 1]` of least squared error among `fit` shrunken ranges and the lines through their codes."""
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best = torch.full_like(low, torch.inf)
    scale, minimum = (high - low) / levels, low
    centred = x - x.mean(dim=-1, keepdim=True)
    for index in range(fit):
        narrow = half * (1 - (1 - NARROWEST) * index / max(1, fit - 1))
        step, start = 2 * narrow / levels, middle - narrow
        codes = _nearest(x, step, start, levels)
        mean = codes.mean(dim=-1, keepdim=True)
        spread = (codes - mean).square().sum(dim=-1, keepdim=True)
        slope = ((codes - mean) * centred).sum(dim=-1, keepdim=True) / torch.where(spread > 0, spread, 1)
        line = slope, x.mean(dim=-1, keepdim=True) - slope * mean
        error = (_nearest(x, *line, levels) * line[0] + line[1] - x).square().sum(dim=-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, line[0], scale), torch.where(better, line[1], minimum)
    return scale, minimum


def to_grid(x: Tensor, grid: Grid, unit: Tensor | float = 1.0, outward: int = 0) -> Tensor:
    """fp32 to the nearest value of the grid's dtype, or to the nearest not below it (`outward` 1) or not above it (-1)."""
    x, info = x / unit, torch.finfo(grid.dtype)
    nearest = x.clamp(info.min, info.max).to(grid.dtype)
    if not outward:
        return nearest
    # half a step of the dtype to one step further: rounds to the next
    beyond = x + outward * (x.abs() * (info.eps / 2)).clamp_min(info.smallest_normal * info.eps / 2)
    beyond = beyond.clamp(info.min, info.max).to(grid.dtype).float()
    return torch.where(outward * (nearest.float() - x) < 0, beyond, nearest.float()).to(grid.dtype)


def as_bytes(x: Tensor) -> Tensor:
    """Eight-bit floats as bytes, which every operation on tensors knows; others as they are."""
    return x.view(torch.uint8) if x.dtype == EIGHT_BITS else x


def _nearest(x: Tensor, step: Tensor, start: Tensor, levels: int) -> Tensor:
    return ((x - start) / torch.where(step > 0, step, 1)).round_().clamp_(0, levels)
