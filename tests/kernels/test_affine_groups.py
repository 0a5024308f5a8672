"""The read of a packed KV cache: the C++ kernel gives the reference's numbers, whatever the shape and the strides."""

from __future__ import annotations

import pytest
import torch

from cache_helpers import packed_groups
from compress.kernels import cpu
from compress.kernels.affine_groups import EIGHT_BITS, expand_groups, expand_groups_reference
from compress.kernels.pack import pack


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("tokens", "runs", "run"),
    [(32, 64, 1), (8, 128, 1), (1, 2, 32), (1, 1, 80), (1, 1, 7), (8, 1, 3), (16, 5, 3), (1, 3, 8)],
)
@pytest.mark.parametrize("kind", [torch.bfloat16, EIGHT_BITS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_reference(
    bits: int, tokens: int, runs: int, run: int, kind: torch.dtype, dtype: torch.dtype
) -> None:
    if cpu.compiled() is None:
        pytest.skip("no C++ compiler")
    rows, channels = 5, runs * run
    packed, affine, units = packed_groups(bits, rows, tokens, runs, run, kind)
    for centre in (None, torch.randn(2, 3, channels)):
        out, want = torch.full((2, 2, 3, rows * tokens + 9, channels + 4), torch.nan, dtype=dtype)
        part = (slice(None), slice(None), slice(4, 4 + rows * tokens), slice(0, channels))
        expand_groups_reference(packed, affine, bits, runs, want[part], units, centre)
        cpu.expand_groups(packed, affine, bits, runs, out[part], units, centre)
        assert torch.equal(out[part], want[part]) and not out[part].isnan().any()
        assert int(out.isnan().sum()) == out.numel() - out[part].numel(), "nothing else is written"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_every_layout_has_a_way(kind: torch.dtype) -> None:
    """Scales in fp16, heads that are not next to their batch in memory and fp16 results run the reference."""
    packed, affine, _ = packed_groups(4, 3, 1, 2, 8, kind)
    want = torch.empty(2, 3, 3, 16)
    expand_groups_reference(packed, affine, 4, 2, want)
    for out in (torch.empty(3, 2, 3, 16).transpose(0, 1), torch.empty(2, 3, 16, 3).mT, torch.empty(2, 3, 3, 16)):
        expand_groups(packed, affine, 4, 2, out)
        assert torch.equal(out, want)
    half = torch.empty(2, 3, 3, 16, dtype=torch.float16)
    expand_groups(packed, affine, 4, 2, half)
    assert torch.equal(half, want.half())
    single = torch.full((1, 1, 0, 16), torch.nan)
    expand_groups(packed[:1, :1, :0], affine[:1, :1, :0], 4, 2, single)


def test_many_rows_are_sliced_and_joined() -> None:
    packed, affine, _ = packed_groups(3, 300, 8, 16, 1, torch.float16)
    out = torch.full((2, 3, 2400, 16), torch.nan)
    expand_groups(packed, affine, 3, 16, out)
    for row in (0, 127, 128, 299):
        alone = torch.empty(2, 3, 8, 16)
        expand_groups_reference(packed[:, :, row : row + 1], affine[:, :, row : row + 1], 3, 16, alone)
        assert torch.equal(out[:, :, 8 * row : 8 * row + 8], alone)


def test_every_eight_bit_float_is_known() -> None:
    """Zeros, subnormals, the largest and the NaN, as scale and as minimum."""
    affine = torch.arange(256).to(torch.uint8)[None, None, :, None].expand(1, 1, 256, 2).contiguous()
    packed, units = pack(torch.arange(8).to(torch.uint8), 3).expand(1, 1, 256, -1).contiguous(), torch.ones(1, 1, 2)
    want, out = torch.empty(1, 1, 256, 8), torch.empty(1, 1, 256, 8)
    expand_groups_reference(packed, affine, 3, 1, want, units)
    expand_groups(packed, affine, 3, 1, out, units)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert want.isnan().any(dim=-1).flatten().nonzero().flatten().tolist() == [127, 255]
