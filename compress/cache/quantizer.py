"""The maths of a quantized token: asymmetric min-max codes in one or two parts of a head, as pure functions.

A part is a run of channels of one head that shares a scale and a minimum. A vector x of n channels at b bits:

    minimum = min x        scale = (max x - minimum) / (2^b - 1)        code = round((x - minimum) / scale)
    read back as minimum + scale code, so every error is at most scale / 2

Scale and minimum take 16 bits each: the states' own dtype if that has 16 bits, else bf16. fp16 cannot hold what a bf16
or fp32 state can (65504 is its end); bf16 has 8 significant bits, which rounded to nearest would push the ends of the
range off the grid by up to half a step at 8 bits. So the minimum is rounded DOWN, the scale is computed from that
minimum and rounded UP, and codes are taken on the resulting grid. It reaches both ends, nothing is clipped, and the
rounding costs a step that is at most 2^-7 wider, twice that where the minimum is not exact: 16-bit states without a basis
hold it, and elsewhere it moves by 2^-7 |minimum|, little unless all channels of a part lie far from 0 on one side.

A head is two parts in "ResQ's format" (arXiv:2412.14363): its last channels, in a basis sorted by variance the ones with
the largest, take more bits. A row of bytes is the packed codes of the parts one after the other; its affine row is
(scale, minimum) of each part. head_dim 64 at 4 bits with the last 8 channels at 8: 28 + 8 bytes of codes, 8 of scales
and minima, 44 in place of 128.

Nothing is shared between tokens or heads: quantizing tokens together or one by one gives the same bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels.pack import pack, packed_width, unpack


class Part(NamedTuple):
    """Channels `start` to `stop` of a head at `bits` bits, in bytes `first_byte` to `last_byte` of the row of codes."""

    start: int
    stop: int
    bits: int
    first_byte: int
    last_byte: int


def parts_of(head_dim: int, bits: int, high_bits: int = 8, high_channels: int = 0) -> list[Part]:
    """The layout of a head: the first channels at `bits`, the last `high_channels` at `high_bits`."""
    widths = [(head_dim - high_channels, bits), (high_channels, high_bits)]
    parts, channel, byte = [], 0, 0
    for count, part_bits in widths:
        if count:
            parts.append(Part(channel, channel + count, part_bits, byte, byte + packed_width(count, part_bits)))
            channel, byte = channel + count, parts[-1].last_byte
    return parts


def quantize_tokens(x: Tensor, bits: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, as x), scale and minimum (`[..., 1]` in `dtype`) of every vector along the last dimension.

    A constant vector gets scale 0 and codes 0 where `dtype` holds its value; elsewhere the tiny step of the gap.
    """
    x = x.float()
    levels = (1 << bits) - 1
    minimum = -_round_up(-x.amin(dim=-1, keepdim=True), dtype)
    offset = x - minimum.float()
    scale = _round_up(offset.amax(dim=-1, keepdim=True) / levels, dtype)
    step = scale.float()
    codes = (offset / torch.where(step > 0, step, 1)).round_().clamp_(0, levels)
    return codes.to(torch.uint8), scale, minimum


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """fp32 values of the codes."""
    return codes.float() * scale.float() + minimum.float()


def encode(x: Tensor, parts: list[Part], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors `[..., head_dim]` to rows of bytes `[..., last_byte]` and affine rows `[..., 2 len(parts)]`."""
    packed, affine = [], []
    for part in parts:
        codes, scale, minimum = quantize_tokens(x[..., part.start : part.stop], part.bits, dtype)
        packed.append(pack(codes, part.bits))
        affine += [scale, minimum]
    return torch.cat(packed, dim=-1), torch.cat(affine, dim=-1)


def decode(packed: Tensor, affine: Tensor, parts: list[Part]) -> Tensor:
    """The fp32 vectors that `encode` wrote."""
    values = []
    for index, part in enumerate(parts):
        codes = unpack(packed[..., part.first_byte : part.last_byte], part.bits, part.stop - part.start)
        scale, minimum = affine[..., 2 * index : 2 * index + 2].split(1, dim=-1)
        values.append(dequantize(codes, scale, minimum))
    return torch.cat(values, dim=-1)


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to the nearest value of a 16-bit dtype that is not below it."""
    nearest = x.to(dtype)
    above = (x + x.abs() * (torch.finfo(dtype).eps / 2)).to(dtype)  # half an ulp to one ulp more: rounds to the next
    return torch.where(nearest.float() < x, above, nearest)
