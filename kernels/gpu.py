"""What the Triton kernels share; sums of programs added up; packed groups of a KV cache multiplied out.

Eight codes of b bits lie in b bytes, so a program takes bytes for some rows and some eights of columns and cuts out code i
of every eight, i = 0 .. 7. Nothing is added up in bf16, which Triton's interpreter gets wrong.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from compress.kernels.layout import outer_stride

try:
    import triton
    import triton.language as tl
except ImportError:  # not a dependency outside Linux
    triton = None

ROWS, EIGHTS = 16, 32  # of a program of group_expand
FULL = 16  # warps that keep a processor of a GPU busy
ADDED = 1024  # sums that a program of add_up adds
WARPS = 4

if triton:

    @triton.jit
    def _code(row, at, used, i: tl.constexpr, BITS: tl.constexpr):
        """Code i of runs that begin at bytes `at` of rows: the bytes it lies in, shifted and cut."""
        first: tl.constexpr = i * BITS // 8
        shift: tl.constexpr = i * BITS % 8
        code = tl.load(row + at + first, mask=used, other=0).to(tl.int32) >> shift
        if shift + BITS > 8:
            code |= tl.load(row + at + first + 1, mask=used, other=0).to(tl.int32) << (8 - shift)
        return code & ((1 << BITS) - 1)

    @triton.jit
    def _affine(at, used, unit, EIGHT_BITS: tl.constexpr):
        """Scales or minima as fp32: 16-bit floats, or the bytes of e4m3, taken apart because sm_80 does not know it."""
        stored = tl.load(at, mask=used, other=0)
        if EIGHT_BITS:
            byte = stored.to(tl.int32)
            exponent, mantissa = (byte >> 3) & 15, byte & 7
            normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
            size = tl.where(exponent > 0, normal, mantissa.to(tl.float32) * 0.001953125)
            size = tl.where((byte & 127) == 127, float("nan"), size)  # the one NaN; there is no infinity
            return tl.where(byte > 127, -size, size) * unit
        return stored.to(tl.float32)

    @triton.jit
    def group_expand(
        packed, affine, unit_pairs, centre, out, rows, K, width, run, runs,
        packed_outer, packed_row, affine_outer, affine_row, out_outer, out_token,
        EIGHT_BITS: tl.constexpr, CENTRE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """out[o, row tokens + k / width, k % width] = code[o, row, k] scale + minimum (+ centre); see `affine_groups`."""
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        e = tl.program_id(1) * EIGHTS + tl.arange(0, EIGHTS)
        o = tl.program_id(2).to(tl.int64)
        used = (r < rows)[:, None] & (8 * e < K)[None, :]
        wide = r.to(tl.int64)[:, None]
        row, pair = packed + o * packed_outer + wide * packed_row, affine + o * affine_outer + wide * affine_row
        scale_unit, start_unit = 1.0, 1.0
        if EIGHT_BITS:
            scale_unit, start_unit = tl.load(unit_pairs + 2 * o), tl.load(unit_pairs + 2 * o + 1)
        for i in tl.static_range(8):
            k = 8 * e + i
            token, channel = k // width, k % width
            inside = used & (k < K)[None, :]
            code = _code(row, e[None, :] * BITS, used, i, BITS).to(tl.float32)
            at = pair + (channel // run)[None, :]
            x = code * _affine(at, inside, scale_unit, EIGHT_BITS) + _affine(at + runs, inside, start_unit, EIGHT_BITS)
            if CENTRE:
                x += tl.load(centre + o * width + channel, mask=k < K, other=0)[None, :]
            to = out + o * out_outer + (wide * (K // width) + token[None, :]) * out_token + channel[None, :]
            tl.store(to, x.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def add_up(sums, y, P, size, ADDED: tl.constexpr):
        """y[i] = sums[0, i] + sums[1, i] + .. in this order, in the dtype of y."""
        i = tl.program_id(0) * ADDED + tl.arange(0, ADDED)
        at, total = sums + i, tl.zeros((ADDED,), tl.float32)
        for _ in range(P):
            total += tl.load(at, mask=i < size, other=0)
            at += size
        tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)


def usable(x: Tensor) -> bool:
    """Whether the kernels can take inputs like these."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def precision() -> str:
    """Of fp32 matrix products: to the last bits, by three tf32 products where the hardware has them."""
    return "ieee" if torch.version.hip else "tf32x3"


@cache
def processors(device: torch.device) -> int:
    """Of a GPU; a CPU stands for a small one, in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def shares(steps: int, warps: int, tokens: int, row_bytes: int, device: torch.device) -> tuple[int, int]:
    """How many programs had better share the steps of a product that takes `warps` warps, and the steps of each.

    They fill the GPU, but sums are not to move more bytes than the rows of the weight do: 4 written and read per token.
    """
    wanted = min(FULL * processors(device) // max(1, warps), row_bytes // (8 * max(1, tokens)))
    each = -(-steps // max(1, min(steps, wanted)))
    return -(-steps // each), each


def added_up(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """`[P, M, N]` fp32 to `[M, N]`, in order, rounded once."""
    y = torch.empty(sums.shape[1:], dtype=dtype, device=sums.device)
    add_up[(triton.cdiv(y.numel(), ADDED),)](sums, y, len(sums), y.numel(), ADDED=ADDED, num_warps=WARPS)
    return y


def hopper() -> bool:
    """Whether tensor cores take a factor from shared memory, which leaves registers for larger tiles."""
    return torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability()[0] == 9


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
