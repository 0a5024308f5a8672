"""The Triton kernel that multiplies packed groups of a KV cache out; what it computes is `compress.kernels.affine_groups`.

A program takes some rows and some eights of columns: words of codes are cut into tiles of neighbours (`gpu_tiles`), so
scales are read and numbers written side by side.
"""

from __future__ import annotations

from torch import Tensor

from compress.kernels.gpu import triton
from compress.kernels.layout import outer_stride

ROWS, EIGHTS, WARPS = 16, 16, 4

if triton:
    import triton.language as tl

    from compress.kernels.gpu import affine_at
    from compress.kernels.gpu_tiles import eights, numbers_of

    @triton.jit
    def group_expand(
        packed, affine, unit_pairs, centre, out, rows, K, width, run, runs,
        packed_outer, packed_row, affine_outer, affine_row, out_outer, out_token,
        EIGHT_BITS: tl.constexpr, CENTRE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """out[o, row tokens + k / width, k % width] = code[o, row, k] scale + minimum (+ centre); see `affine_groups`."""
        r, o = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2).to(tl.int64)
        e = tl.program_id(1) * EIGHTS + tl.arange(0, EIGHTS)
        k = tl.program_id(1) * 8 * EIGHTS + tl.arange(0, 8 * EIGHTS)
        here, wide = (r < rows)[:, None], r.to(tl.int64)[:, None]
        row, pair = packed + o * packed_outer + wide * packed_row, affine + o * affine_outer + wide * affine_row
        code = numbers_of(eights(row, e, here & (8 * e < K)[None, :], BITS, False), 0, BITS, tl.float32)
        scale_unit, start_unit = 1.0, 1.0
        if EIGHT_BITS:
            scale_unit, start_unit = tl.load(unit_pairs + 2 * o), tl.load(unit_pairs + 2 * o + 1)
        token, channel = k // width, k % width
        inside = here & (k < K)[None, :]
        at = pair + (channel // run)[None, :]
        x = code * affine_at(at, inside, scale_unit, EIGHT_BITS)
        x += affine_at(at + runs, inside, start_unit, EIGHT_BITS)
        if CENTRE:
            x += tl.load(centre + o * width + channel, mask=k < K, other=0)[None, :]
        to = out + o * out_outer + (wide * (K // width) + token[None, :]) * out_token + channel[None, :]
        tl.store(to, x.to(out.dtype.element_ty), mask=inside)


def expand_groups(
    packed: Tensor, affine: Tensor, bits: int, runs: int, out: Tensor, units: Tensor | None, centre: Tensor | None
) -> None:
    """Write groups of a KV cache multiplied out; batch and heads of every tensor must be one dimension in memory."""
    batch, heads, tokens, channels = out.shape
    rows = packed.shape[2]
    codes = tokens // rows * channels
    extra = [out if tensor is None else tensor.float().contiguous() for tensor in (units, centre)]
    outer = [outer_stride(tensor) for tensor in (packed, affine, out)]
    group_expand[(triton.cdiv(rows, ROWS), triton.cdiv(codes, 8 * EIGHTS), batch * heads)](
        packed, affine, *extra, out, rows, codes, channels, channels // runs, runs,
        outer[0], packed.stride(2), outer[1], affine.stride(2), outer[2], out.stride(2),
        EIGHT_BITS=units is not None, CENTRE=centre is not None, BITS=bits, ROWS=ROWS, EIGHTS=EIGHTS, num_warps=WARPS,
    )  # fmt: skip
