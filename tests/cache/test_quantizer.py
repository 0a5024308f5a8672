"""Codes of a token: nothing clipped, every error within half a step of the grid that is stored."""

from __future__ import annotations

import pytest
import torch

from cache_helpers import states
from compress.cache.quantizer import decode, dequantize, encode, parts_of, quantize_tokens


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_error_is_within_half_a_step_on_the_rounded_grid(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(500, 24) * torch.logspace(-2, 3, 500)[:, None] + 20 * torch.randn(500, 1)
    codes, scale, minimum = quantize_tokens(x, bits, dtype)
    assert codes.dtype == torch.uint8 and scale.dtype == minimum.dtype == dtype
    assert int(codes.max()) == 2**bits - 1 and int(codes.min()) == 0
    step = scale.float()
    assert ((dequantize(codes, scale, minimum) - x).abs() <= step * (0.5 + 1e-4) + 1e-5).all()
    ideal = (x.amax(-1) - minimum.float().squeeze(-1)) / (2**bits - 1)
    assert (step.squeeze(-1) <= ideal * (1 + torch.finfo(dtype).eps) + 1e-7).all(), "rounded up by more than an ulp"


def test_constant_vectors_come_back() -> None:
    x = torch.tensor([0.0, -3.5, 100.1, 1e-3])[:, None].expand(-1, 16)
    back = dequantize(*quantize_tokens(x, 4))
    assert torch.equal(back[:2], x[:2])  # bf16 holds them
    torch.testing.assert_close(back, x, rtol=1e-3, atol=0)
    codes, scale, _ = quantize_tokens(x[:2], 4)
    assert not codes.any() and not scale.any()


def test_parts_are_coded_apart() -> None:
    x = states(5)
    packed, affine = encode(x, parts_of(64, 3, 6, 8), torch.bfloat16)
    assert packed.shape[-1] == 56 * 3 // 8 + 6 and affine.shape[-1] == 4
    low, high = (dequantize(*quantize_tokens(part, bits)) for part, bits in ((x[..., :56], 3), (x[..., 56:], 6)))
    assert torch.equal(decode(packed, affine, parts_of(64, 3, 6, 8)), torch.cat([low, high], dim=-1))
