"""A head of one token as bytes: its channels in one or two parts, each rounded on its own (`compress.kernels.rounding`).

**Two parts** are "ResQ's format" (arXiv:2412.14363): the last channels of a head, in a basis sorted by variance the ones
with the largest, take more bits. A row of bytes is the packed codes of the parts one after the other; its affine row is
(scale, minimum) of each part. head_dim 64 at 4 bits with the last 8 channels at 8: 28 + 8 bytes of codes, 8 of scales
and minima, 44 in place of 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels.affine_groups import expand_groups
from compress.kernels.group_packing import pack_groups
from compress.kernels.pack import packed_width


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


def encode(x: Tensor, parts: list[Part], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors `[batch, heads, tokens, head_dim]` to rows of bytes and affine rows `[..., 2 len(parts)]`."""
    rows = [pack_groups(x[..., part.start : part.stop], part.bits, 1, 1, dtype) for part in parts]
    packed, affine = zip(*rows, strict=True)
    return torch.cat(packed, dim=-1), torch.cat(affine, dim=-1)


def decode(packed: Tensor, affine: Tensor, parts: list[Part], out: Tensor) -> None:
    """Write the vectors that `encode` wrote into `out` `[batch, heads, tokens, head_dim]`."""
    for index, part in enumerate(parts):
        codes, pair = packed[..., part.first_byte : part.last_byte], affine[..., 2 * index : 2 * index + 2]
        expand_groups(codes, pair, part.bits, 1, out[..., part.start : part.stop])
