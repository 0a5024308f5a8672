"""Uniform symmetric quantization of weights: the one definition of codes, scales and groups.

A row of I weights is cut into groups of neighbouring columns. Group g of a row holds codes c with
-2^(b-1) <= c < 2^(b-1) and one scale s, and stands for c s. Scales may be negative: the code range reaches one step
further down than up, so the sign of s decides which side of zero gets the extra step (llama.cpp's Q4_0 does the same).
Scales are rounded to their 16-bit storage before codes are chosen, so their rounding costs nothing.

The scale is searched, not read off the largest entry: of `steps` shrunken ranges, with either sign, the one with the
smallest weighted error. Cost: 2 `steps` passes over the weights.

Legend: N rows (output neurons), I columns (input features).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16  # the range of fp32: a scale can neither overflow nor vanish
_SMALLEST_SHRINK = 0.35


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
    weight_Nn: Tensor, bits: int, *, steps: int = 24, power: float = 2.0, importance: Tensor | None = None
) -> Tensor:
    """Scale `[N, 1]` of one group, in fp32 but exactly representable in the storage dtype.

    Args:
        steps: shrunken ranges tried; 1 takes the largest entry as it is.
        power: the error is |w - c s|^power; GPTQ's code uses 2.4, which minds large errors more.
        importance: weight of each column's error `[n]`.
    """
    half = 1 << (bits - 1)
    largest = weight_Nn.gather(1, weight_Nn.abs().argmax(dim=1, keepdim=True))  # with its sign
    unit = torch.where(largest == 0, 0, 1 / largest.abs())  # errors relative to it: their powers neither vanish nor overflow
    best_scale = torch.zeros_like(largest)
    best_error = torch.full_like(largest, torch.inf)
    for shrink in torch.linspace(1, _SMALLEST_SHRINK if steps > 1 else 1, steps).tolist():
        for full in (-half, half - 1):  # the code of the largest weight: on the longer or on the shorter side
            scale = stored_scale(largest * (shrink / full))
            error = ((weight_Nn - quantize(weight_Nn, scale, bits) * scale) * unit).abs_()
            error = error.square_() if power == 2 else error.pow_(power)
            if importance is not None:
                error *= importance
            error = error.sum(dim=1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
    return best_scale


def search_scales(
    weight_NI: Tensor, groups: list[Group], *, steps: int = 24, power: float = 2.0, importance_I: Tensor | None = None
) -> Tensor:
    """Scales `[N, groups]` of all groups; see `search_scale`."""
    columns = [slice(group.start, group.stop) for group in groups]
    weights = [None if importance_I is None else importance_I[part] for part in columns]
    return torch.cat(
        [
            search_scale(weight_NI[:, part], group.bits, steps=steps, power=power, importance=importance)
            for group, part, importance in zip(groups, columns, weights, strict=True)
        ],
        dim=1,
    )


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
