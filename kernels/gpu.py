"""The Triton kernels: products of few tokens with packed weights; packed weights and KV caches multiplied out.

One walk serves every width: eight codes of b bits lie in b bytes, so a program takes bytes for some rows and some eights of
columns, cuts out code i of every eight, i = 0 .. 7, and meets it with inputs 8 e + i. Bitmask-packed rows are walked by
bytes of the mask; how many bits are set before a column says where its value lies. Sums are fp32; inputs are read in their
own dtype and nothing is computed in bf16, which Triton's interpreter gets wrong.

Reading each weight once is all that decoding needs: a token is a program of its own, and tokens after the first find the
weights in the L2 cache. Above `MOST_TOKENS` the weight is expanded once into a scratch matrix and cuBLAS multiplies.

Legend: M tokens, N output neurons, K columns (atoms of a sparse row), G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.layout import outer_stride

try:
    import triton
    import triton.language as tl
except ImportError:  # not a dependency outside Linux
    triton = None

MOST_TOKENS = 16
ROWS, EIGHTS = 16, 32  # of a program: 16 rows x 256 columns at a time, so that an input read serves several rows
WORD = {2: torch.int16, 4: torch.int32, 8: torch.int32}  # widths whose eights are whole words: read at once
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
    def integer_decode(
        x, packed, scale, y, N, K, row_words, groups, group_size, x_stride,
        ADD: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """y[m, n] (+)= sum over k of x[m, k] (code[n, k] - 2^(BITS-1)) scale[n, k / group_size]."""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token = tl.program_id(1)
        here = n < N
        row = packed + n.to(tl.int64)[:, None] * row_words
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, tl.cdiv(K, 8), EIGHTS):
            e = start + tl.arange(0, EIGHTS)
            inside = 8 * e < K
            used = here[:, None] & inside[None, :]
            part, sums = tl.zeros((ROWS, EIGHTS), tl.float32), tl.zeros((EIGHTS,), tl.float32)
            for half in tl.static_range(2):
                if WORDS:  # the word of the second half of two- and four-bit codes is that of the first
                    at = 2 * e + half if BITS == 8 else e
                    word = tl.load(row + at[None, :], mask=used, other=0).to(tl.int32)
                for j in tl.static_range(4):
                    k = 8 * e + 4 * half + j
                    value = tl.load(x + token * x_stride + k, mask=k < K, other=0).to(tl.float32)
                    if WORDS:
                        code = (word >> ((j if BITS == 8 else 4 * half + j) * BITS)) & ((1 << BITS) - 1)
                    else:
                        code = _code(row, e[None, :] * BITS, used, 4 * half + j, BITS)
                    part += code.to(tl.float32) * value[None, :]
                    sums += value
            part -= (1 << (BITS - 1)) * sums[None, :]  # codes are stored with an offset
            group = (8 * e) // group_size
            factor = tl.load(scale + n[:, None] * groups + group[None, :], mask=used, other=0).to(tl.float32)
            total += tl.sum(part * factor, 1)
        to = y + token * N + n
        if ADD:
            total += tl.load(to, mask=here, other=0)
        tl.store(to, total, mask=here)

    @triton.jit
    def integer_expand(
        packed, scale, out, N, K, row_bytes, groups, group_size, out_stride,
        BITS: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """out[n, k] = (code[n, k] - 2^(BITS-1)) scale[n, k / group_size], in the dtype of out."""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        e = tl.program_id(1) * EIGHTS + tl.arange(0, EIGHTS)
        used = (n < N)[:, None] & (8 * e < K)[None, :]
        row = packed + n.to(tl.int64)[:, None] * row_bytes
        factor = tl.load(scale + n[:, None] * groups + ((8 * e) // group_size)[None, :], mask=used, other=0).to(tl.float32)
        for i in tl.static_range(8):
            k = 8 * e + i
            code = _code(row, e[None, :] * BITS, used, i, BITS)
            value = (code - (1 << (BITS - 1))).to(tl.float32) * factor
            to = out + n.to(tl.int64)[:, None] * out_stride + k[None, :]
            tl.store(to, value.to(out.dtype.element_ty), mask=used & (k < K)[None, :])

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
    def _count(bits):
        """Bits set in numbers below 256."""
        bits = bits - ((bits >> 1) & 0x55)
        bits = (bits & 0x33) + ((bits >> 2) & 0x33)
        return (bits + (bits >> 4)) & 0x0F

    @triton.jit
    def sparse_decode(
        x, values, scale, mask, y, N, A, units, row_values, mask_bytes, groups, group_size, unit_groups, x_stride,
        BITS: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """y[m, n] = sum over the atoms that row n uses of x[m, atom] times its value; BITS 16: bf16 values, else codes."""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token = tl.program_id(1)
        here = n < N
        wide = n.to(tl.int64)[:, None]
        total, before = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32)
        for start in range(0, mask_bytes, EIGHTS):
            e = start + tl.arange(0, EIGHTS)
            used = here[:, None] & (e < mask_bytes)[None, :]
            pattern = tl.load(mask + wide * mask_bytes + e[None, :], mask=used, other=0).to(tl.int32)
            counts = _count(pattern)
            first = before[:, None] + tl.cumsum(counts, 1) - counts
            before += tl.sum(counts, 1)
            part = tl.zeros((ROWS, EIGHTS), tl.float32)
            for i in tl.static_range(8):
                atom = 8 * e + i
                value = tl.load(x + token * x_stride + atom, mask=atom < A, other=0).to(tl.float32)
                kept = ((pattern >> i) & 1) != 0
                at = first + _count(pattern & ((1 << i) - 1))
                if BITS == 16:
                    weight = tl.load(values + wide * row_values + at, mask=kept, other=0).to(tl.float32)
                else:
                    bit = at * BITS
                    byte = values + wide * row_values + (bit >> 3)
                    code = tl.load(byte, mask=kept, other=0).to(tl.int32)
                    straddles = kept & ((bit & 7) + BITS > 8)
                    code |= tl.load(byte + 1, mask=straddles, other=0).to(tl.int32) << 8
                    code = (code >> (bit & 7)) & ((1 << BITS) - 1)
                    weight = tl.where(kept, (code - (1 << (BITS - 1))).to(tl.float32), 0.0)
                part += weight * value[None, :]
            if BITS < 16:
                atom = 8 * e
                group = tl.where(atom < units, atom // group_size, unit_groups + (atom - units) // group_size)
                part *= tl.load(scale + wide * groups + group[None, :], mask=used, other=0).to(tl.float32)
            total += tl.sum(part, 1)
        tl.store(y + token * N + n, total, mask=here)


def usable(x: Tensor) -> bool:
    """Whether the kernels can take inputs like these."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def precision() -> str:
    """Of fp32 matrix products: to the last bits, by three tf32 products where the hardware has them."""
    return "ieee" if torch.version.hip else "tf32x3"


def hopper() -> bool:
    """Whether tensor cores take a factor from shared memory, which leaves registers for larger tiles."""
    return torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability()[0] == 9


def integer_product(
    x_MK: Tensor, packed: Tensor, scale_NG: Tensor, bits: int, group_size: int, add_to: Tensor | None = None
) -> Tensor:
    """`[M, N]` fp32 of inputs, a slice of columns if need be, and packed weights; groups must be multiples of 8."""
    tokens, width = x_MK.shape
    rows = len(packed)
    y = torch.empty(tokens, rows, dtype=torch.float32, device=x_MK.device) if add_to is None else add_to
    words = packed.view(WORD[bits]) if bits in WORD else packed
    integer_decode[(triton.cdiv(rows, ROWS), tokens)](
        x_MK, words, scale_NG, y, rows, width, words.shape[1], scale_NG.shape[1], group_size or width, x_MK.stride(0),
        ADD=add_to is not None, BITS=bits, WORDS=bits in WORD, ROWS=ROWS, EIGHTS=EIGHTS, num_warps=WARPS,
    )  # fmt: skip
    return y


def expanded(packed: Tensor, scale_NG: Tensor, bits: int, group_size: int, out_NK: Tensor) -> None:
    """Write the weight of packed codes into `[N, K]`, which may be a slice of columns."""
    rows, width = out_NK.shape
    integer_expand[(triton.cdiv(rows, ROWS), triton.cdiv(width, 8 * EIGHTS))](
        packed, scale_NG, out_NK, rows, width, packed.shape[1], scale_NG.shape[1], group_size or width, out_NK.stride(0),
        BITS=bits, ROWS=ROWS, EIGHTS=EIGHTS, num_warps=WARPS,
    )  # fmt: skip


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


def sparse_product(
    x_MA: Tensor, values: Tensor, scale_NG: Tensor | None, mask: Tensor, units: int, bits: int, group_size: int
) -> Tensor:
    """`[M, N]` fp32 of inputs and bitmask-packed rows over `units` unit atoms and then the learned ones.

    Of integers, both the units and the groups must be multiples of 8.
    """
    tokens, atoms = x_MA.shape
    rows = len(values)
    y = torch.empty(tokens, rows, dtype=torch.float32, device=x_MA.device)
    step = group_size or atoms
    sparse_decode[(triton.cdiv(rows, ROWS), tokens)](
        x_MA, values, mask if scale_NG is None else scale_NG, mask, y, rows, atoms, units, values.shape[1], mask.shape[1],
        0 if scale_NG is None else scale_NG.shape[1], step, -(-units // step), x_MA.stride(0),
        BITS=bits, ROWS=ROWS, EIGHTS=EIGHTS, num_warps=WARPS,
    )  # fmt: skip
    return y
