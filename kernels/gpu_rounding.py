"""Rounding of inputs on the fly on a GPU: one pass from 16-bit numbers to the int8 codes that tensor cores multiply.

What is computed is `compress.kernels.mixed_precision.rounded_activation`, per token and slice of a part. The reference makes
some fifteen passes over the inputs; here a program reads its slice twice, the second time from the cache, and writes a byte
per input. Divisions are rounded correctly, halves go to even and no product is fused with a sum, so codes, scales and zeros
are those of the reference, but for sums of squares that are added up in another order.

A code q of b bits with zero z stands for (q - z) scale. Stored is

    q - z      b < 8: it fits in a byte, and no zero is left for the product to subtract
    q - 128    b = 8: it fits, and the zero is stored with 128 subtracted too

and where it is stored suits the packed weights that it meets. Their codes fill whole bytes in runs of `planes(bits)`, so a
kernel takes code i of many runs at a time; the inputs of column k lie in plane k % planes, at k // planes.

Legend: M tokens, K columns of a part, S slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from compress.kernels.gpu import triton

BLOCK = 2048  # inputs in registers at a time
WARPS = 4

if triton:
    import triton.language as tl

    @triton.jit
    def _nearest(x):
        """Halves to even: above 2^23 fp32 has no fractions left. Past 2^22 it is inexact, and far from any code."""
        return (x + 12582912.0) - 12582912.0

    @triton.jit
    def scale_and_zero(least, most, squares, count, top, clip):
        """Of some inputs, from their extremes, the sum of their squares and their number, fp32.

        Extremes pass a NaN by, the sum does not: it makes the scale, and so the token, NaN, as an infinite range does.
        """
        bound = tl.where(clip > 0, clip * tl.sqrt_rn(tl.div_rn(squares, count)), float("inf"))
        least = tl.maximum(tl.minimum(least, 0.0), -bound)
        most = tl.minimum(tl.maximum(most, 0.0), bound)
        halved = (least == -bound) & (most == bound) & (bound > 0)
        scale = tl.div_rn(most - least, top)
        scale = tl.where(scale > 0, scale, 1.0)
        scale = tl.where((squares == squares) & (scale < float("inf")), scale, float("nan"))
        return scale, tl.where(halved, (top + 1.0) * 0.5, _nearest(tl.div_rn(-least, scale)))

    @triton.jit
    def stored_codes(x, scale, zero, top, CENTRED: tl.constexpr):
        """int8, as the head of this file says."""
        code = tl.minimum(tl.maximum(_nearest(tl.div_rn(x, scale)) + zero, 0.0), top)
        return (code - (128.0 if CENTRED else zero)).to(tl.int8)

    @triton.jit
    def round_slices(
        x, codes, scale, zero, width, x_stride, plane, count, top, clip,
        CENTRED: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program rounds one slice of one token: the range of its `width` inputs first, then every code."""
        token, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
        start = x + token * x_stride + s * width
        least, most = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, width, BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(start + at, mask=at < width, other=0).to(tl.float32)
            least, most = tl.minimum(least, value), tl.maximum(most, value)
            squares += value * value
        unit, shift = scale_and_zero(tl.min(least, 0), tl.max(most, 0), tl.sum(squares, 0), count, top, clip)
        whole = tl.cdiv(width, PLANES) * PLANES  # zeros fill the last run, and add nothing to any product
        for first in range(0, whole, BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(start + at, mask=at < width, other=0).to(tl.float32)
            k = s * width + at
            to = codes + token * PLANES * plane + (k % PLANES) * plane + k // PLANES
            tl.store(to, stored_codes(value, unit, shift, top, CENTRED), mask=at < whole)
        pair = token * tl.num_programs(1) + s
        tl.store(scale + pair, unit)
        if CENTRED:
            tl.store(zero + pair, (shift - 128.0).to(tl.int32))


@dataclass(frozen=True)
class Codes:
    """Rounded inputs of one part: int8 in planes, fp32 scales `[M, S]`, and int32 zeros where the codes need them."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    plane: int


def planes(bits: int) -> int:
    """How many codes of a packed row fill whole bytes."""
    return 8 // gcd(8, bits)


def room_for(x_MK: Tensor, slices: int, weight_bits: int, bits: int) -> Codes:
    """Where the codes of a part go, before they are written."""
    tokens, width = x_MK.shape
    runs = planes(weight_bits)
    plane = -(-width // (16 * runs)) * 16  # 16 bytes are read at once
    codes = torch.empty(tokens, runs * plane, dtype=torch.int8, device=x_MK.device)
    scale = torch.empty(tokens, slices, dtype=torch.float32, device=x_MK.device)
    zero = torch.empty_like(scale, dtype=torch.int32) if bits == 8 else None
    return Codes(codes, scale, zero, plane)


def rounded(x_MK: Tensor, slices: int, weight_bits: int, bits: int, clip: float) -> Codes:
    """Round a slice of columns, each token's `slices` of it for themselves, for a weight of packed codes."""
    room, width = room_for(x_MK, slices, weight_bits, bits), x_MK.shape[1] // slices
    round_slices[(len(x_MK), slices)](
        x_MK, room.codes, room.scale, room.scale if room.zero is None else room.zero, width, x_MK.stride(0), room.plane,
        float(width), float((1 << bits) - 1), clip,
        CENTRED=bits == 8, PLANES=planes(weight_bits), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return room
