"""How the Triton kernels cut packed codes out into tiles for tensor cores.

Eight codes of b bits lie in b bytes: a run of them is read as one number, code i of every run is shifted out of it, for i
from 0 to 7, and the eight results are joined in registers, so that eight neighbours lie in one thread and go to shared
memory in one piece. In bitmask-packed rows the set bits before a column say where its value lies.
"""

from __future__ import annotations

from compress.kernels.gpu import triton

if triton:
    import triton.language as tl

    @triton.jit
    def eights(row, e, used, BITS: tl.constexpr, WORDS: tl.constexpr):
        """The codes of runs e as one number, int32 up to 4 bits, else int64; WORDS: rows of 2, 4 or 8 bits as words."""
        if WORDS:
            return tl.load(row + e[None, :], mask=used, other=0).to(tl.int32 if BITS <= 4 else tl.int64)
        else:
            kind: tl.constexpr = tl.int32 if BITS <= 4 else tl.int64
            word = tl.zeros(used.shape, kind)
            for j in tl.static_range(BITS):
                word |= tl.load(row + (BITS * e[None, :] + j), mask=used, other=0).to(kind) << (8 * j)
            return word

    @triton.jit
    def code_of(word, i: tl.constexpr, BITS: tl.constexpr):
        """Code i of runs read as one number."""
        return ((word >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.int32)

    @triton.jit
    def joined(c0, c1, c2, c3, c4, c5, c6, c7):
        """[R, E] of columns 8 e + i, i = 0 .. 7, to [R, 8 E]: eight neighbours in the registers of a thread."""
        even, odd = tl.join(tl.join(c0, c4), tl.join(c2, c6)), tl.join(tl.join(c1, c5), tl.join(c3, c7))
        return tl.reshape(tl.join(even, odd), (c0.shape[0], 8 * c0.shape[1]))

    @triton.jit
    def number_of(word, i: tl.constexpr, half, BITS: tl.constexpr, KIND: tl.constexpr):
        """Code i of runs read as one number, less `half`, which is exact in bf16, too."""
        code = code_of(word, i, BITS)
        if tl.bfloat16 == KIND and BITS < 8:  # below 128 a code is the end of the mantissa of 128 + code: no conversion
            return (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (128 + half)
        else:
            return (code - half).to(KIND)

    @triton.jit
    def numbers_of(word, half, BITS: tl.constexpr, KIND: tl.constexpr):
        """The codes of runs read as one number each, less `half`, [R, E] to [R, 8 E]."""
        c0, c1 = number_of(word, 0, half, BITS, KIND), number_of(word, 1, half, BITS, KIND)
        c2, c3 = number_of(word, 2, half, BITS, KIND), number_of(word, 3, half, BITS, KIND)
        c4, c5 = number_of(word, 4, half, BITS, KIND), number_of(word, 5, half, BITS, KIND)
        c6, c7 = number_of(word, 6, half, BITS, KIND), number_of(word, 7, half, BITS, KIND)
        return joined(c0, c1, c2, c3, c4, c5, c6, c7)

    @triton.jit
    def count_bits(bits):
        """Bits set in numbers below 256."""
        bits = bits - ((bits >> 1) & 0x55)
        bits = (bits & 0x33) + ((bits >> 2) & 0x33)
        return (bits + (bits >> 4)) & 0x0F

    @triton.jit
    def plane(i: tl.constexpr, row, word, at, BITS: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr):
        """The numbers of columns 8 e + i, codes less their offset or values as stored, and how many values come before the
        next column."""
        half: tl.constexpr = 1 << (BITS - 1)
        if MASKED:
            kept = (word >> i) & 1
            if BITS == 16:
                return tl.load(row + at, mask=kept != 0, other=0).to(KIND), at + kept
            else:
                bit = at * BITS
                code = tl.load(row + (bit >> 3), mask=kept != 0, other=0).to(tl.int32)
                if 8 % BITS != 0:
                    straddles = (kept != 0) & ((bit & 7) + BITS > 8)
                    code |= tl.load(row + (bit >> 3) + 1, mask=straddles, other=0).to(tl.int32) << 8
                code = (code >> (bit & 7)) & ((1 << BITS) - 1)
                return tl.where(kept != 0, code - half, 0).to(KIND), at + kept
        else:
            return number_of(word, i, half, BITS, KIND), at

    @triton.jit
    def stored_of(
        values, row_values, mask, mask_bytes, n, step, stop, here,
        BITS: tl.constexpr, MASKED: tl.constexpr, EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """What a step reads first of rows n: eights of codes, codes of 8 bits each, or the mask; none from `stop` on."""
        e, rows = step * EIGHTS + tl.arange(0, EIGHTS), n.to(tl.int64)[:, None]
        used = here[:, None] & (8 * e < stop)[None, :]
        if MASKED:
            return tl.load(mask + rows * mask_bytes + e[None, :], mask=used, other=0).to(tl.int32)
        elif BITS == 8:
            k = step * 8 * EIGHTS + tl.arange(0, 8 * EIGHTS)
            return tl.load(values + rows * row_values + k[None, :], mask=here[:, None] & (k < stop)[None, :], other=128)
        else:
            return eights(values + rows * row_values, e, used, BITS, BITS == 2 or BITS == 4)

    @triton.jit
    def tile_of(
        stored, values, row_values, before, n,
        BITS: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr,
    ):  # fmt: skip
        """Numbers of rows n and the columns of a step, [ROWS, 8 EIGHTS], and how many values the rows have had by then."""
        if BITS == 8 and not MASKED:
            return (stored ^ 128).to(tl.int8, bitcast=True).to(KIND), before
        else:
            row, at = values + n.to(tl.int64)[:, None] * row_values, before[:, None]
            if MASKED:
                counts = count_bits(stored)
                at += tl.cumsum(counts, 1) - counts
                before += tl.sum(counts, 1)
            c0, at = plane(0, row, stored, at, BITS, MASKED, KIND)
            c1, at = plane(1, row, stored, at, BITS, MASKED, KIND)
            c2, at = plane(2, row, stored, at, BITS, MASKED, KIND)
            c3, at = plane(3, row, stored, at, BITS, MASKED, KIND)
            c4, at = plane(4, row, stored, at, BITS, MASKED, KIND)
            c5, at = plane(5, row, stored, at, BITS, MASKED, KIND)
            c6, at = plane(6, row, stored, at, BITS, MASKED, KIND)
            c7, at = plane(7, row, stored, at, BITS, MASKED, KIND)
            return joined(c0, c1, c2, c3, c4, c5, c6, c7), before

    @triton.jit
    def values_before(mask, mask_bytes, n, stop, here, ROWS: tl.constexpr, EIGHTS: tl.constexpr):
        """Bits set in rows n of the mask before byte `stop`."""
        found = tl.zeros((ROWS,), tl.int32)
        for first in range(0, stop, 4 * EIGHTS):
            e = first + tl.arange(0, 4 * EIGHTS)
            at = mask + n.to(tl.int64)[:, None] * mask_bytes + e[None, :]
            found += tl.sum(count_bits(tl.load(at, mask=here[:, None] & (e < stop)[None, :], other=0).to(tl.int32)), 1)
        return found
