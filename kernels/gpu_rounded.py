"""y = x W^T of rounded inputs and packed weights of one or two parts on the int8 tensor cores of a GPU, in one kernel.

The formula is that of `compress.kernels.mixed_precision`: integer sums per segment, exact in int32, times the two scales of
the segment. Weights are cut out of their bytes in registers and become the left factor of a product, so they never pass
through shared memory as codes; the inputs, a byte each, are the right one (`compress.kernels.gpu_rounding` says how they
lie). Inputs of 8 bits have a zero z that is subtracted as z rho, and rho, the sum of a row of weight codes, is one more
product, with sixteen columns of ones. Both parts add to the same fp32 sums, which are rounded to the output's dtype once.

int4 tensor cores are not used: Hopper has none, and emulates them by int8 ones (sm_80 has).
Cost: T N I multiply-adds of int8, and about five instructions to cut a code of 4 bits out, shared by `TOKENS` tokens. One
token is a tile that is nearly empty, and the kernel is then bound by cutting codes out. Where rows and tokens are too few to
fill a GPU, programs share the columns, and their fp32 sums are added up in order.

Legend: M tokens, N output neurons, runs: columns whose codes fill whole bytes; code i of every run is plane i.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels.gpu import added_up, hopper, shares, triton
from compress.kernels.gpu_rounding import Codes, planes
from compress.kernels.part import Part


class Tile(NamedTuple):
    """What a program computes."""

    tokens: int
    rows: int
    warps: int


FEW, SOME, MORE, MANY = Tile(16, 32, 2), Tile(32, 64, 4), Tile(64, 64, 4), Tile(128, 64, 4)
STAGES = 3

if triton:
    import triton.language as tl

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
    def _add_part(
        total, m0, n0, p, M, N, codes, x_scale, x_zero, packed, scale, runs, segment, share, plane, row_bytes, slices,
        of_slice, groups, of_group,
        BITS: tl.constexpr, PLANES: tl.constexpr, CENTRED: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr,
        TOKENS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """total[n, m] plus the products of share p of one part; lengths along columns are counted in runs."""
        runs *= ALIGN  # divided by it on the way in: so the compiler knows, and reads 16 bytes at once
        segment *= ALIGN
        share *= ALIGN
        plane *= 16
        m, n = m0 + tl.arange(0, TOKENS), n0 + tl.arange(0, ROWS)
        there, here = m < M, n < N
        seen = codes + m0.to(tl.int64) * (PLANES * plane) + tl.arange(0, TOKENS)[None, :] * (PLANES * plane)
        row = packed + n0.to(tl.int64) * row_bytes + tl.arange(0, ROWS)[:, None] * row_bytes
        begin, end = p * share, tl.minimum((p + 1) * share, runs)
        stop_at = tl.where(begin < runs, tl.cdiv(end, segment), 0)  # of the shorter part a share may be empty
        for s in range(begin // segment, stop_at):
            start = tl.multiple_of(tl.maximum(s * segment, begin), ALIGN)
            stop = tl.minimum((s + 1) * segment, end)
            product = tl.zeros((ROWS, TOKENS), tl.int32)
            if CENTRED:
                rho = tl.zeros((ROWS, 16), tl.int32)
            for first in tl.range(start, stop, RUNS, num_stages=STAGES):
                e = first + tl.arange(0, RUNS)
                inside = e < stop
                for i in tl.static_range(PLANES):
                    at = e[None, :] * (PLANES * BITS // 8)
                    code = _code(row, at, here[:, None] & inside[None, :], i, BITS)
                    # [ROWS, RUNS]
                    weight = (code - (1 << (BITS - 1))).to(tl.int8)
                    # [RUNS, TOKENS]
                    x = tl.load(seen + i * plane + e[:, None], mask=inside[:, None] & there[None, :], other=0)
                    product = tl.dot(weight, x, product, out_dtype=tl.int32)
                    if CENTRED:
                        ones = tl.broadcast_to(inside.to(tl.int8)[:, None], (RUNS, 16))
                        rho = tl.dot(weight, ones, rho, out_dtype=tl.int32)
            if CENTRED:
                zero = tl.load(x_zero + m * slices + start // of_slice, mask=there, other=0)
                product -= tl.max(rho, 1)[:, None] * zero[None, :]  # its columns are equal
            from_input = tl.load(x_scale + m * slices + start // of_slice, mask=there, other=0)
            of_weight = tl.load(scale + n * groups + start // of_group, mask=here, other=0).to(tl.float32)
            total += (of_weight[:, None] * from_input[None, :]) * product.to(tl.float32)
        return total

    @triton.jit
    def rounded_product(
        y, M, N,
        low_codes, low_x_scale, low_x_zero, low, low_scale, low_runs, low_segment, low_share, low_plane, low_bytes,
        low_slices, low_of_slice, low_groups, low_of_group,
        high_codes, high_x_scale, high_x_zero, high, high_scale, high_runs, high_segment, high_share, high_plane, high_bytes,
        high_slices, high_of_slice, high_groups, high_of_group,
        LOW: tl.constexpr, LOW_PLANES: tl.constexpr, LOW_CENTRED: tl.constexpr, LOW_ALIGN: tl.constexpr,
        LOW_RUNS: tl.constexpr,
        HIGH: tl.constexpr, HIGH_PLANES: tl.constexpr, HIGH_CENTRED: tl.constexpr, HIGH_ALIGN: tl.constexpr,
        HIGH_RUNS: tl.constexpr,
        TOKENS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """y[p, m, n], from shares of both parts or, with HIGH 0 bits, of the low one."""
        n0, m0, p = tl.program_id(0) * ROWS, tl.program_id(1) * TOKENS, tl.program_id(2)
        total = _add_part(
            tl.zeros((ROWS, TOKENS), tl.float32), m0, n0, p, M, N, low_codes, low_x_scale, low_x_zero, low, low_scale,
            low_runs, low_segment, low_share, low_plane, low_bytes, low_slices, low_of_slice, low_groups, low_of_group,
            LOW, LOW_PLANES, LOW_CENTRED, LOW_ALIGN, LOW_RUNS, TOKENS, ROWS, STAGES,
        )  # fmt: skip
        if HIGH:
            total = _add_part(
                total, m0, n0, p, M, N, high_codes, high_x_scale, high_x_zero, high, high_scale, high_runs, high_segment,
                high_share, high_plane, high_bytes, high_slices, high_of_slice, high_groups, high_of_group,
                HIGH, HIGH_PLANES, HIGH_CENTRED, HIGH_ALIGN, HIGH_RUNS, TOKENS, ROWS, STAGES,
            )  # fmt: skip
        m, n = tl.arange(0, TOKENS)[None, :], tl.arange(0, ROWS)[:, None]
        to = y + (p.to(tl.int64) * M + m0) * N + n0 + m * N + n
        tl.store(to, total.to(y.dtype.element_ty), mask=(n0 + n < N) & (m0 + m < M))


def product(seen: list[Codes], parts: list[Part], dtype: torch.dtype) -> Tensor:
    """`[M, N]` of the rounded inputs of every part."""
    tokens, rows = len(seen[0].codes), len(parts[0].packed)
    chosen, device = tile(tokens, [part.bits for part in parts], hopper()), seen[0].codes.device
    grid = triton.cdiv(rows, chosen.rows), triton.cdiv(tokens, chosen.tokens)
    arguments, described, programs = [], [], 0
    for codes, part in zip(seen, parts, strict=True):
        width, run, slices = part.width, planes(part.bits), codes.scale.shape[1]
        runs, group = -(-width // run), -(-(part.group_size or width) // run)
        segment = runs if part.segment >= width else part.segment // run
        align = gcd(16, runs, segment)
        described.append((part.bits, codes.zero is not None, align, segment))
        most = runs_of(part.bits)
        if not programs:  # of the low part, which is the larger one
            row_bytes = part.packed.shape[1]
            programs, _ = shares(-(-runs // most), chosen.warps * grid[0] * grid[1], tokens, row_bytes, device)
        share = most * -(-runs // (most * programs))
        arguments += [
            codes.codes, codes.scale, codes.scale if codes.zero is None else codes.zero, part.packed, part.scale,
            runs // align, segment // align, share // align, codes.plane // 16, part.packed.shape[1], slices,
            -(-runs // slices), part.scale.shape[1], group,
        ]  # fmt: skip
    y = torch.empty(programs, tokens, rows, dtype=dtype if programs == 1 else torch.float32, device=device)
    rounded_product[(*grid, programs)](
        y, tokens, rows, *arguments, *(arguments if len(parts) == 1 else ()), **constants(chosen, described),
        num_warps=chosen.warps,
    )  # fmt: skip
    return y[0] if programs == 1 else added_up(y, dtype)


def runs_of(bits: int) -> int:
    """The most runs that a program takes at a time."""
    return 64 if planes(bits) <= 2 else 32


def tile(tokens: int, bits: list[int], hopper: bool) -> Tile:
    """For parts of these bits: the largest that the tokens fill and that does not spill."""
    run = max(map(planes, bits))
    largest = FEW if run == 8 else MANY if hopper else SOME if run == 4 else MORE
    return next(tile for tile in (FEW, SOME, MORE, MANY) if tile == largest or tokens <= tile.tokens)


def constants(tile: Tile, parts: list[tuple[int, bool, int, int]]) -> dict[str, int]:
    """What the kernel is compiled for; a part is its bits, whether codes are centred, alignment and runs of a segment."""
    found = {"TOKENS": tile.tokens, "ROWS": tile.rows, "STAGES": STAGES}
    absent = (0, False, 1, 1)
    for name, (bits, centred, align, segment) in zip(("LOW", "HIGH"), [*parts, absent], strict=False):
        run, most = planes(bits or 8), runs_of(bits or 8)
        found |= {
            name: bits, f"{name}_PLANES": run, f"{name}_CENTRED": centred, f"{name}_ALIGN": align,
            f"{name}_RUNS": min(max(32, triton.next_power_of_2(segment)), most),  # int8 products take no fewer than 32
        }  # fmt: skip
    return found
