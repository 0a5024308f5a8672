"""The Triton kernel that writes packed groups of a KV cache; what it computes is `compress.kernels.group_packing`.

A program takes a row. It walks its runs a few at a time, finds their scales, and writes codes into a scratch row of bytes
and, under compensation, what they are off by into a scratch row of errors. The next block of channels is corrected by all
errors so far in one matrix product before it is rounded; the reference adds them to all channels behind as they arise. Last,
the codes are read eight at a time and leave as words of `bits` bytes. Both scratch rows belong to one program; a barrier
parts writing from reading.

What decides a code is computed step by step as the reference does it: no multiplication is fused with an addition, divisions
round to nearest, and scales are rounded to their grid in the bits of fp32, since sm_80 has no e4m3, gfx942 another one, and
Triton's interpreter cannot round to bf16. Only sums over the numbers of a group have their own order. NaN is looked for,
because minima and maxima of the hardware pass it by.

Cost: states read once, packed bytes written once, one byte of scratch a number and four more under compensation. Of the
instructions, 320 a number with a search of five in eight bits (sm_90, static), most are the divisions of 15 roundings.

Legend: `tall` numbers of a group, `wide` runs rounded at once, as powers of two.
"""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from compress.kernels.affine_groups import EIGHT_BITS
from compress.kernels.gpu import precision, triton
from compress.kernels.gpu_group_products import power
from compress.kernels.layout import one_outer, outer_stride
from compress.kernels.pack import packed_width
from compress.kernels.rounding import NARROWEST

TILE, WIDEST, PER_WARP = 512, 16, 128  # numbers and runs of a program at once, numbers of a warp
TALLEST, TALLEST_MOVED = 1024, 128  # numbers of a group; of one that is compensated
DEPTH, EIGHTS = 16, 128  # channels of a correction, words of the packing, at a time

if triton:
    import triton.language as tl

    @triton.jit
    def _on_grid(x, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
        """fp32 to the nearest, ties to even, that has so many bits of mantissa and lies between the largest; in fp32."""
        x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
        word = x.to(tl.int32, bitcast=True)
        drop: tl.constexpr = 23 - MANTISSA
        size = (word & 0x7FFFFFFF) + ((1 << (drop - 1)) - 1) + ((word >> drop) & 1)
        size = (size >> drop) << drop
        if MANTISSA != 7:  # bf16 has the exponents of fp32, and its subnormals round by themselves
            magic: tl.constexpr = 1.5 * SMALLEST * 2 ** (23 - MANTISSA)  # fp32 has the steps of subnormals there
            near = ((tl.abs(x) + magic) - magic).to(tl.int32, bitcast=True)
            size = tl.where(tl.abs(x) < SMALLEST, near, size)
        rounded = (size | (word & -0x80000000)).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, float("nan"))

    @triton.jit
    def _to_grid(x, OUTWARD: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
        """`rounding.to_grid`, in units."""
        nearest = _on_grid(x, MANTISSA, SMALLEST, LARGEST)
        if OUTWARD != 0:
            half: tl.constexpr = 0.5**MANTISSA / 2
            least = tl.full([], SMALLEST * half, tl.float32)  # of bf16 it is a subnormal, which would be taken for fp64
            step = tl.maximum(tl.abs(x) * half, least)
            beyond = _on_grid(x + OUTWARD * step, MANTISSA, SMALLEST, LARGEST)
            nearest = tl.where(OUTWARD * (nearest - x) < 0, beyond, nearest)
        return nearest

    @triton.jit
    def _stored(x, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr):
        """The byte or the 16 bits of numbers that are on the grid."""
        word = x.to(tl.int32, bitcast=True)
        if MANTISSA == 7:
            stored = (word >> 16).to(tl.int16)
        elif MANTISSA == 10:
            stored = x.to(tl.float16).to(tl.int16, bitcast=True)
        else:
            steps = (tl.abs(x) * (2.0**MANTISSA / SMALLEST)).to(tl.int32)
            size = tl.where(tl.abs(x) < SMALLEST, steps, ((word >> 20) & 0x7FF) - (120 << 3))
            stored = tl.where(x == x, size | ((word >> 24) & 0x80), 127).to(tl.uint8)
        return stored

    @triton.jit
    def _nearest(x, step, start, LEVELS: tl.constexpr):
        """Codes, fp32; of a NaN, NaN."""
        code = tl.div_rn(x - start[None, :], tl.where(step > 0, step, 1.0)[None, :])
        code = tl.where(code > LEVELS, LEVELS, tl.where(code < 0, 0.0, code))
        return (code + 8388608.0) - 8388608.0  # to the nearest whole number, ties to even

    @triton.jit
    def _mean(x, used, count):
        return tl.div_rn(tl.sum(tl.where(used, x, 0.0), 0), count)

    @triton.jit
    def _squares(x, used):
        return tl.sum(tl.where(used, x * x, 0.0), 0)

    @triton.jit
    def _searched(x, used, count, low, high, LEVELS: tl.constexpr, FIT: tl.constexpr, NARROWEST: tl.constexpr):
        """`rounding.best_range`"""
        middle, half = (low + high) / 2, (high - low) / 2
        best = tl.full(low.shape, float("inf"), tl.float32)
        scale, minimum = tl.div_rn(high - low, LEVELS), low
        x_mean = _mean(x, used, count)
        centred = x - x_mean[None, :]
        steps: tl.constexpr = FIT - 1 if FIT > 1 else 1
        for index in range(FIT):
            shrunk = tl.full([], index, tl.float64) * (1 - NARROWEST) / steps  # as Python computes it
            narrow = half * (1 - shrunk).to(tl.float32)
            code = _nearest(x, tl.div_rn(2 * narrow, LEVELS), middle - narrow, LEVELS)
            mean = _mean(code, used, count)
            off = code - mean[None, :]
            spread = _squares(off, used)
            slope = tl.div_rn(tl.sum(tl.where(used, off * centred, 0.0), 0), tl.where(spread > 0, spread, 1.0))
            start = x_mean - slope * mean
            error = _squares(_nearest(x, slope, start, LEVELS) * slope[None, :] + start[None, :] - x, used)
            better = error < best
            best = tl.where(better, error, best)
            scale, minimum = tl.where(better, slope, scale), tl.where(better, start, minimum)
        return scale, minimum

    @triton.jit
    def _scales(
        x, used, count, scale_unit, start_unit,
        LEVELS: tl.constexpr, FIT: tl.constexpr, NARROWEST: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr,
        LARGEST: tl.constexpr,
    ):  # fmt: skip
        """Scale and minimum of every column on the grid, in units: what `rounding.quantize` takes."""
        low = tl.min(tl.where(used, x, float("inf")), 0)
        high = tl.max(tl.where(used, x, float("-inf")), 0)
        strange = tl.max((x != x).to(tl.int32), 0) > 0
        low, high = tl.where(strange, float("nan"), low), tl.where(strange, float("nan"), high)
        scale, start = low, low
        if FIT > 0:
            scale, start = _searched(x, used, count, low, high, LEVELS, FIT, NARROWEST)
        # ways 0 to 3 of `rounding._EITHER_WAY`: eight bits try all, of 16 bits the first or the last is taken
        one: tl.constexpr = 0 if FIT > 0 else 3
        first: tl.constexpr = 0 if MANTISSA == 3 else one
        last: tl.constexpr = 4 if MANTISSA == 3 else one + 1
        best, best_start, least = low, low, low
        for way in tl.static_range(first, last):
            minimum = _to_grid(tl.div_rn(start, start_unit), -(way // 2), MANTISSA, SMALLEST, LARGEST)
            at = minimum * start_unit
            if FIT == 0:
                scale = tl.div_rn(high - at, LEVELS)
            found = _to_grid(tl.div_rn(scale, scale_unit), way % 2, MANTISSA, SMALLEST, LARGEST)
            step = found * scale_unit
            error = _squares(_nearest(x, step, at, LEVELS) * step[None, :] + at[None, :] - x, used)
            better = (error < least) | (way == first)
            best, best_start = tl.where(better, found, best), tl.where(better, minimum, best_start)
            least = tl.where(better, error, least)
        return best, best_start

    @triton.jit
    def group_pack(
        states, unit_pairs, centre, order, moves, errors, codes, packed, affine,
        rows, count, runs, run, metrics, moves_outer, states_outer, states_token, row_bytes,
        UNITS: tl.constexpr, CENTRE: tl.constexpr, BITS: tl.constexpr, FIT: tl.constexpr, NARROWEST: tl.constexpr,
        MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
        NUMBERS: tl.constexpr, RUNS: tl.constexpr, DEPTH: tl.constexpr, EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Row r of head o: scales, codes and bytes of `count` numbers in each of `runs` runs; BLOCK 0: no compensation."""
        r, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        n, g = tl.arange(0, NUMBERS), tl.arange(0, RUNS)
        token, width = n // run, runs * run
        row = o * rows + r
        of_row = states + o * states_outer + r * (count // run) * states_token
        code_row, error_row = codes + row * count * runs, errors + row * count * runs
        metric = o % metrics
        scale_unit, start_unit = 1.0, 1.0
        if UNITS:
            scale_unit, start_unit = tl.load(unit_pairs + 2 * o), tl.load(unit_pairs + 2 * o + 1)
        LEVELS: tl.constexpr = (1 << BITS) - 1
        span = BLOCK if BLOCK > 0 else runs
        for begin in range(0, runs, span):
            for first in range(begin, begin + span, RUNS):
                place = first + g
                here = place < begin + span
                used = (n < count)[:, None] & here[None, :]
                at = place
                if BLOCK > 0:
                    at = tl.load(order + metric * runs + place, mask=here, other=0).to(tl.int32)
                channel = at[None, :] * run + (n % run)[:, None]
                x = tl.load(of_row + token[:, None] * states_token + channel, mask=used, other=0).to(tl.float32)
                if CENTRE:
                    x -= tl.load(centre + o * width + channel, mask=used, other=0)
                if BLOCK > 0:
                    for before in range(0, begin, DEPTH):
                        k = before + tl.arange(0, DEPTH)
                        t, known = k // BLOCK, k < begin
                        known_here = (n < count)[:, None] & known[None, :]
                        off = tl.load(error_row + n[:, None] * runs + k[None, :], mask=known_here, other=0)
                        matrix = t * BLOCK * runs - BLOCK * BLOCK * (t * (t + 1) // 2) + k % BLOCK  # G_t, its column
                        entry = matrix[:, None] + (place[None, :] - (t[:, None] + 1) * BLOCK) * BLOCK
                        move = tl.load(moves + metric * moves_outer + entry, mask=known[:, None] & here[None, :], other=0)
                        x += tl.dot(off, move, input_precision=PRECISION)
                scale, minimum = _scales(
                    x, used, tl.full([], count, tl.float32), scale_unit, start_unit,
                    LEVELS, FIT, NARROWEST, MANTISSA, SMALLEST, LARGEST,
                )  # fmt: skip
                pair = affine + row * 2 * runs + at
                tl.store(pair, _stored(scale, MANTISSA, SMALLEST), mask=here)
                tl.store(pair + runs, _stored(minimum, MANTISSA, SMALLEST), mask=here)
                scale, minimum = scale * scale_unit, minimum * start_unit
                code = _nearest(x, scale, minimum, LEVELS)
                number = tl.where(code == code, code, 0.0).to(tl.uint8)
                tl.store(code_row + token[:, None] * width + channel, number, mask=used)
                if BLOCK > 0:
                    off = code * scale[None, :] + minimum[None, :] - x
                    tl.store(error_row + n[:, None] * runs + place[None, :], off, mask=used)
            tl.debug_barrier()
        i = tl.arange(0, 8)
        for first in range(0, tl.cdiv(count * runs, 8), EIGHTS):
            e = first + tl.arange(0, EIGHTS)
            k = 8 * e[:, None] + i[None, :]
            code = tl.load(code_row + k, mask=k < count * runs, other=0).to(tl.int64)
            word = tl.sum(code << (BITS * i)[None, :], 1)
            for byte in tl.static_range(BITS):
                to = packed + row * row_bytes + e * BITS + byte
                tl.store(to, ((word >> (8 * byte)) & 255).to(tl.uint8), mask=e * BITS < row_bytes)


def fits(numbers: int, moved: bool) -> bool:
    """Whether groups of so many numbers, compensated or not, stay in the registers of a program on every GPU."""
    return numbers <= (TALLEST_MOVED if moved else TALLEST)


def packed(
    states: Tensor, bits: int, tokens: int, runs: int, dtype: torch.dtype, units: Tensor | None, centre: Tensor | None,
    order: Tensor | None, moves: Tensor | None, block: int, fit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed rows and their scales and minima; arguments as in the reference."""
    batch, heads, count, width = states.shape
    states = states if one_outer(states) else states.contiguous()
    rows, numbers = count // tokens, tokens * width // runs
    eight = dtype == EIGHT_BITS
    shape = (batch, heads, rows)
    out = states.new_empty(*shape, packed_width(tokens * width, bits), dtype=torch.uint8)
    affine = states.new_empty(*shape, 2 * runs, dtype=torch.uint8 if eight else dtype)
    codes = states.new_empty(*shape, tokens * width, dtype=torch.uint8)
    errors = codes if order is None else states.new_empty(*shape, tokens * width, dtype=torch.float32)
    extra = [out if tensor is None else tensor.float().contiguous() for tensor in (units, centre)]
    metric = [out if tensor is None else tensor.contiguous() for tensor in (order, moves)]
    metrics = 1 if order is None else order.shape[0] * heads
    group_pack[(rows, batch * heads)](
        states, *extra, *metric, errors, codes, out, affine if eight else affine.view(torch.int16),
        rows, numbers, runs, width // runs, metrics, 0 if moves is None else moves.shape[2], outer_stride(states),
        states.stride(2), out.shape[3], UNITS=units is not None, CENTRE=centre is not None, BITS=bits, FIT=fit,
        PRECISION=precision(), **constants(numbers, runs, 0 if order is None else block, dtype),
    )  # fmt: skip
    return out, affine


def constants(numbers: int, runs: int, block: int, dtype: torch.dtype) -> dict[str, object]:
    """How a program is cut, and the dtype of scales: bits of mantissa, smallest normal and largest number."""
    tall, info = power(numbers, 16), torch.finfo(dtype)
    wide = min(power(block or runs), WIDEST, max(1, TILE // tall))
    at_once = tall * max(wide, DEPTH // 2 if block else 0)
    return {
        "NUMBERS": tall, "RUNS": wide, "BLOCK": block, "DEPTH": DEPTH, "EIGHTS": EIGHTS, "NARROWEST": NARROWEST,
        "MANTISSA": -round(log2(info.eps)), "SMALLEST": info.smallest_normal, "LARGEST": info.max,
        "num_warps": min(8, max(1, at_once // PER_WARP)), "enable_fp_fusion": False,
    }  # fmt: skip
