"""y = x W^T of one token and a packed weight, on a GPU without its tensor cores.

One token leaves fifteen of a tensor core's sixteen columns idle, and the way there leads through shared memory. Here a lane
takes eight neighbouring columns of a few rows: one word of codes per row, eight inputs that all rows share. A code is cut
out where it lies in the word: it becomes the end of the mantissa of 2^23 + code 2^r, from which 2^23 + half 2^r is taken,
and the 2^-r is in the input. That is exact, and costs two instructions and a multiply-add. The sum of eight is scaled once.
The values of a bitmask-packed row lie where the set bits before them say, so one warp walks such a row.

A program has whole rows, so there are no sums of programs to add up, and the same inputs give the same bits.
Cost: the packed bytes read once, six instructions a code of 4 bits, seventeen a bit of a mask; inputs come from the caches.
Two tokens would take no longer than the tensor cores' way, three longer.

Legend: N output neurons, K columns (atoms of a sparse row), G groups, e eights of columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.kernels.gpu import as_words, processors, triton

if TYPE_CHECKING:
    from compress.kernels.gpu_products import Weight

LANES = 32
ROWS, WARPS = 8, 4  # of a program, at most; a lane has an eight of every row
MASKED_TILE, MASKED_TILE_16 = (2, 1), (4, 2)  # rows and warps behind a mask, of codes and of 16-bit values
FILLED = 3  # programs for every processor
MOST_TOKENS = 1

if triton:
    import triton.language as tl

    from compress.kernels.gpu_tiles import count_bits, eights, plane

    @triton.jit
    def _apart(x, EIGHTS: tl.constexpr):
        """[8 EIGHTS] as the eight planes [EIGHTS] of columns 8 e + i, which the lane has loaded where they are 16-bit."""
        even, odd = tl.split(tl.reshape(x, (EIGHTS, 2, 2, 2)))
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x2, x6 = tl.split(x26)
        x1, x5 = tl.split(x15)
        x3, x7 = tl.split(x37)
        return x0, x1, x2, x3, x4, x5, x6, x7

    @triton.jit
    def _term(word, x, i: tl.constexpr, BITS: tl.constexpr):
        """(code i of every word - half) x, as the two factors: the code is cut out 2^r too large, and x made smaller."""
        first: tl.constexpr = i * BITS
        away: tl.constexpr = 0 if first + BITS <= 23 else first // 16 * 16  # what does not fit a mantissa is shifted
        r: tl.constexpr = first - away
        inside = (word >> away).to(tl.int32) & (((1 << BITS) - 1) << r)
        code = (inside | 0x4B000000).to(tl.float32, bitcast=True) - (8388608 + (1 << (BITS - 1 + r)))
        return code, (x * (1 / (1 << r)))[None, :]

    @triton.jit
    def _eight_terms(word, x, BITS: tl.constexpr, EIGHTS: tl.constexpr):
        """The sums of eight products, [ROWS, EIGHTS]."""
        xs = _apart(x, EIGHTS)
        code, seen = _term(word, xs[0], 0, BITS)
        total = code * seen
        for i in tl.static_range(1, 8):
            code, seen = _term(word, xs[i], i, BITS)
            total += code * seen
        return total

    @triton.jit
    def _eight_gathered(row, kept, at, x, BITS: tl.constexpr, EIGHTS: tl.constexpr):
        """The same where bits of `kept` say which columns have a value; the first lies `at` in the row."""
        xs = _apart(x, EIGHTS)
        code, at = plane(0, row, kept, at, BITS, True, tl.float32)
        total = code * xs[0][None, :]
        for i in tl.static_range(1, 8):
            code, at = plane(i, row, kept, at, BITS, True, tl.float32)
            total += code * xs[i][None, :]
        return total

    @triton.jit
    def _words(
        row, of_mask, step, words,
        BITS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """The words of a step, or the bytes of the mask; none past the last."""
        e = step * EIGHTS + tl.arange(0, EIGHTS)
        used = tl.broadcast_to((e < words)[None, :], (ROWS, EIGHTS))
        if MASKED:
            return tl.load(of_mask + e[None, :], mask=used, other=0).to(tl.int32)
        else:
            return eights(row, e, used, BITS, BITS == 2 or BITS == 4 or BITS == 8)

    @triton.jit(do_not_specialize=["row_values", "mask_bytes"])  # a lane reads one word: so its columns are its inputs'
    def decode_product(
        x, values, scale, mask, y, N, K, row_values, mask_bytes, units, groups, unit_groups, x_stride, words,
        BITS: tl.constexpr, MASKED: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr,
        EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """y[m, n] of token m; `GROUP` (0: one group), `units` and `words` are counted in eights."""
        n, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
        there = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows past the last read it again
        row, of_row = values + there * row_values, scale + there * groups
        of_mask = mask + there * mask_bytes
        before = tl.zeros((ROWS,), tl.int32)
        total = tl.zeros((ROWS, EIGHTS), tl.float32)
        next_word = _words(row, of_mask, 0, words, BITS, MASKED, ROWS, EIGHTS)
        for step in range(0, tl.cdiv(words, EIGHTS)):
            word, next_word = next_word, _words(row, of_mask, step + 1, words, BITS, MASKED, ROWS, EIGHTS)
            e, k = step * EIGHTS + tl.arange(0, EIGHTS), step * 8 * EIGHTS + tl.arange(0, 8 * EIGHTS)
            seen = tl.load(x + m * x_stride + k, mask=k < K, other=0).to(tl.float32)
            if MASKED:
                counts = count_bits(word)
                ends = before[:, None] + tl.cumsum(counts, 1)
                part = _eight_gathered(row, word, ends - counts, seen, BITS, EIGHTS)
                before += tl.sum(counts, 1)
            else:
                part = _eight_terms(word, seen, BITS, EIGHTS)
            if BITS < 16:
                g = e // GROUP if GROUP else e * 0
                if UNITS:  # groups of learned atoms begin anew
                    behind = (e - units) // GROUP if GROUP else 0
                    g = tl.where(e < units, g, unit_groups + behind)
                part *= tl.load(of_row + g[None, :], mask=(e < words)[None, :], other=0).to(tl.float32)
            total += part
        tl.store(y + m * N + n, tl.sum(total, 1).to(y.dtype.element_ty), mask=n < N)


def write_product(x_MK: Tensor, weight: Weight, y_MN: Tensor) -> None:
    """Fill `[M, N]`; the weight is read once for every token."""
    values, scale, mask = weight.tensors
    columns, _, mask_bytes, units, groups, unit_groups, group = weight.sizes
    masked, bits = weight.constants["MASKED"], weight.constants["BITS"]
    if bits == 8 and not masked:
        values = as_words(values, torch.int64)  # eights, as codes of 2 and 4 bits are
    rows, warps = masked_tile(bits) if masked else (rows_of(weight.rows, x_MK.device), WARPS)
    decode_product[(triton.cdiv(weight.rows, rows), len(x_MK))](
        x_MK, values, scale, mask, y_MN, weight.rows, columns, values.shape[1], mask_bytes, units // 8, groups, unit_groups,
        x_MK.stride(0), triton.cdiv(columns, 8), BITS=bits, MASKED=masked, GROUP=group // 8 if group < columns else 0,
        UNITS=0 < units < columns, ROWS=rows, EIGHTS=LANES * warps, num_warps=warps,
    )  # fmt: skip


def masked_tile(bits: int) -> tuple[int, int]:
    """Rows and warps of a program of bitmask-packed rows."""
    return MASKED_TILE_16 if bits == 16 else MASKED_TILE


def rows_of(outputs: int, device: torch.device) -> int:
    """Rows of a program: fewer where the programs of more would not fill the GPU."""
    rows = ROWS
    while rows > 2 and outputs < FILLED * rows * processors(device):
        rows //= 2
    return rows
