"""Integer codes of 2 to 8 bits in bytes: one layout for weights and caches.

Eight codes of b bits fill b bytes, least significant bits first: code i of a row occupies bits b i .. b (i + 1) - 1 of
the row's bit stream, and bit 0 is the lowest bit of byte 0.

    b = 4    byte j = code 2j | code 2j+1 << 4
    b = 2    byte j = code 4j | code 4j+1 << 2 | code 4j+2 << 4 | code 4j+3 << 6
    b = 3    bytes 3j .. 3j+2 = sum over i of code 8j+i << 3 i, little-endian
    b = 8    byte j = code j

A row whose length is not a multiple of 8 is filled up with zero bits. Codes are unsigned; a signed code c of b bits is
stored as c + 2^(b-1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return (count + 7) // 8 * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[..., count]`, each below 2^bits, to bytes `[..., packed_width(count, bits)]`."""
    count = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -count % 8))
    if bits == 8:
        return codes.contiguous()
    eights = codes.unflatten(-1, (-1, 8)).long()
    word = (eights << (bits * torch.arange(8, device=codes.device))).sum(dim=-1, keepdim=True)
    return (word >> (8 * torch.arange(bits, device=codes.device)) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Bytes back to uint8 codes `[..., count]`."""
    if bits == 8:
        return packed[..., :count]
    if bits in (2, 4):  # codes do not straddle bytes: no wide integers needed
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        codes = packed[..., None] >> shifts & (1 << bits) - 1
        return codes.flatten(-2)[..., :count]
    word = packed.unflatten(-1, (-1, bits)).long() << (8 * torch.arange(bits, device=packed.device))
    word = word.sum(dim=-1, keepdim=True)
    codes = word >> (bits * torch.arange(8, device=packed.device)) & (1 << bits) - 1
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def pack_signed(codes: Tensor, bits: int) -> Tensor:
    """Signed codes, -2^(bits-1) <= code < 2^(bits-1), to bytes."""
    return pack((codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), bits)


def unpack_signed(packed: Tensor, bits: int, count: int) -> Tensor:
    """Bytes back to signed codes `[..., count]` int8."""
    return (unpack(packed, bits, count).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def holds_more(packed: Tensor, bits: int, count: int) -> bool:
    """Whether any row has a bit set behind its `count` codes."""
    unused = packed_width(count, bits) * 8 - count * bits
    if not unused:
        return False
    tail = packed[..., -bits:].long() << (8 * torch.arange(bits, device=packed.device))
    return bool((tail.sum(dim=-1) & (1 << 8 * bits) - 1).bitwise_right_shift(8 * bits - unused).any())
