"""A head in two parts: each is what it would be alone."""

from __future__ import annotations

import torch

from cache_helpers import states
from compress.cache.quantizer import decode, encode, parts_of
from compress.kernels.rounding import Grid, quantize


def test_parts_are_coded_apart() -> None:
    x, grid = states(5), Grid(torch.bfloat16)
    packed, affine = encode(x, parts_of(64, 3, 6, 8), torch.bfloat16)
    assert packed.shape[-1] == 56 * 3 // 8 + 6 and affine.shape[-1] == 4
    low, high = (quantize(part, bits, grid).values for part, bits in ((x[..., :56], 3), (x[..., 56:], 6)))
    out = torch.full(x.shape, torch.nan)
    decode(packed, affine, parts_of(64, 3, 6, 8), out)
    assert torch.equal(out, torch.cat([low, high], dim=-1))
