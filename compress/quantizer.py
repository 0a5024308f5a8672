"""Uniform symmetric quantization of weights: the one definition of codes, scales and groups.

A row of I weights is cut into groups of neighbouring columns. Group g of a row holds codes c with
-2^(b-1) <= c < 2^(b-1) and one scale s, and stands for c s. Scales may be negative: the code range reaches one step
further down than up, so the sign of s decides which side of zero gets the extra step (llama.cpp's Q4_0 does the same).
Scales are rounded to their 16-bit storage before codes are chosen, so their rounding costs nothing.

The scale is searched, not read off the largest entry: of `steps` shrunken ranges, with either sign, the one with the
smallest weighted error. Cost: 2 `steps` passes over the weights, all groups of one size at once.

Legend: N rows (output neurons), I columns (input features).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16  # the range of fp32: a scale can neither overflow nor vanish
_SMALLEST_SHRINK = 0.35
_AT_ONCE_ON_CPU = 1 << 18  # weights of one search: what stays in a core's cache
_AT_ONCE = 1 << 25  # enough to fill a GPU, in some five copies


@dataclass(frozen=True)
class Group:
    """Columns `start` to `stop` share one scale per row and a code width."""

    start: int
    stop: int
    bits: int


def groups_of(width: int, bits: int, group_size: int, *, start: int = 0) -> list[Group]:
    """Cut `width` columns into groups; size 0 is one group, the last one may be shorter."""
    step = group_size or width
    return [Group(start + at, start + min(at + step, width), bits) for at in range(0, width, step)] if width else []


def runs_of(groups: list[Group]) -> Iterator[list[Group]]:
    """Neighbouring groups of the same size and width of codes, which one operation can work on."""
    return (list(run) for _, run in groupby(groups, key=lambda group: (group.stop - group.start, group.bits)))


def by_group(x: Tensor, run: list[Group]) -> Tensor:
    """The columns of a run as `[..., groups, n]`, without a copy."""
    return x[..., run[0].start : run[-1].stop].unflatten(-1, (len(run), -1))


def quantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest codes, as floats, for weights `[..., n]` and scales `[..., 1]`; a zero scale gives zero codes."""
    half = 1 << (bits - 1)
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (weight * inverse).round_().clamp_(-half, half - 1)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored, in fp32; one too small to be inverted is zero."""
    stored = scale.to(SCALE_DTYPE).float()
    return torch.where(stored.abs() < torch.finfo(torch.float32).tiny, 0, stored)


def search_scale(
    weight: Tensor, bits: int, *, steps: int = 24, power: float = 2.0, importance: Tensor | None = None
) -> Tensor:
    """Scales `[..., 1]` of groups `[..., n]`, in fp32 but exactly representable in the storage dtype.

    Args:
        steps: shrunken ranges tried; 1 takes the largest entry as it is.
        power: the error is |w - c s|^power; GPTQ's code uses 2.4, which minds large errors more.
        importance: weight of each column's error, `[n]` or `[groups, n]`.
    """
    half = 1 << (bits - 1)
    largest = weight.gather(-1, weight.abs().argmax(dim=-1, keepdim=True))  # with its sign
    unit = torch.where(largest == 0, 0, 1 / largest.abs())  # errors relative to it: their powers neither vanish nor overflow
    best_scale = torch.zeros_like(largest)
    best_error = torch.full_like(largest, torch.inf)
    for shrink in torch.linspace(1, _SMALLEST_SHRINK if steps > 1 else 1, steps).tolist():
        for full in (-half, half - 1):  # the code of the largest weight: on the longer or on the shorter side
            scale = stored_scale(largest * (shrink / full))
            error = (weight - quantize(weight, scale, bits) * scale) * unit
            error = error.square_() if power == 2 else error.abs_().pow_(power)
            if importance is not None:
                error *= importance
            error = error.sum(dim=-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
    return best_scale


def search_scales(
    weight_NI: Tensor, groups: list[Group], *, steps: int = 24, power: float = 2.0, importance_I: Tensor | None = None
) -> Tensor:
    """Scales `[N, groups]` of all groups; see `search_scale`."""
    at_once = _AT_ONCE_ON_CPU if weight_NI.device.type == "cpu" else _AT_ONCE
    scales = []
    for run in runs_of(groups):
        weight, importance = by_group(weight_NI, run), None if importance_I is None else by_group(importance_I, run)
        rows = max(1, at_once // weight[0].numel())
        found = [
            search_scale(part, run[0].bits, steps=steps, power=power, importance=importance) for part in weight.split(rows)
        ]
        scales.append(torch.cat(found).squeeze(-1))
    return torch.cat(scales, dim=1)


def round_to_nearest(weight_NI: Tensor, groups: list[Group], **search: object) -> tuple[Tensor, Tensor]:
    """Codes `[N, I]` int8 and scales `[N, groups]` of every weight for itself; keyword arguments as in `search_scales`."""
    codes, scales = torch.empty_like(weight_NI, dtype=torch.int8), search_scales(weight_NI, groups, **search)
    for number, group in enumerate(groups):
        part, scale = weight_NI[:, group.start : group.stop], scales[:, number : number + 1]
        codes[:, group.start : group.stop] = quantize(part, scale, group.bits).to(torch.int8)
    return codes, scales


def dequantize(codes_NI: Tensor, scales_NG: Tensor, groups: list[Group]) -> Tensor:
    """The fp32 weights that codes and scales stand for."""
    widths = torch.tensor([group.stop - group.start for group in groups], device=codes_NI.device)
    return codes_NI.float() * scales_NG.float().repeat_interleave(widths, dim=1)
