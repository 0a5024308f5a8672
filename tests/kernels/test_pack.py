"""Packing is a bijection with the layout that its docstring draws."""

from __future__ import annotations

import pytest
import torch

from compress.kernels.pack import pack, packed_width, unpack


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(8,), (3, 64), (2, 5, 56), (4, 1), (3, 13)], ids=str)
def test_round_trip(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_is_a_little_endian_bit_stream(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (16,), dtype=torch.uint8)
    stream = sum(int(code) << (bits * index) for index, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == stream.to_bytes(2 * bits, "little")
