"""y = x W^T of rounded inputs and packed weights of one or two parts on the int8 tensor cores of a GPU, in one kernel.

The formula is that of `compress.kernels.mixed_precision`: integer sums per segment, exact in int32, times the two scales of
the segment. Weights are cut out of their bytes in registers and become the left factor of a product, so they never pass
through shared memory as codes; the inputs, a byte each, are the right one (`compress.kernels.gpu_rounding` says how they
lie). Inputs of 8 bits have a zero z that is subtracted as z rho, and rho, the sum of a row of weight codes, is one more
product, with sixteen columns of ones. Both parts add to the same fp32 sums, which are rounded to the output's dtype once.

int4 tensor cores are not used: Hopper has none, and emulates them by int8 ones (sm_80 has).
Cost: T N I multiply-adds of int8, and about five instructions to cut a code of 4 bits out, shared by `TOKENS` tokens. One
token is a tile that is nearly empty, and the kernel is then bound by cutting codes out. Programs do not share the columns of
a row, so a matrix of few rows does not fill a large GPU while decoding.

Legend: M tokens, N output neurons, runs: columns whose codes fill whole bytes; code i of every run is plane i.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels.gpu import hopper, triton
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

    from compress.kernels.gpu import _code

    @triton.jit
    def _add_part(
        total, m0, n0, M, N, codes, x_scale, x_zero, packed, scale, runs, segment, plane, row_bytes, slices, of_slice,
        groups, of_group,
        BITS: tl.constexpr, PLANES: tl.constexpr, CENTRED: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr,
        TOKENS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """total[n, m] plus the products of one part; lengths along columns are counted in runs."""
        runs *= ALIGN  # divided by it on the way in: so the compiler knows, and reads 16 bytes at once
        segment *= ALIGN
        plane *= 16
        m, n = m0 + tl.arange(0, TOKENS), n0 + tl.arange(0, ROWS)
        there, here = m < M, n < N
        seen = codes + m0.to(tl.int64) * (PLANES * plane) + tl.arange(0, TOKENS)[None, :] * (PLANES * plane)
        row = packed + n0.to(tl.int64) * row_bytes + tl.arange(0, ROWS)[:, None] * row_bytes
        for s in range(0, tl.cdiv(runs, segment)):
            start = s * segment
            product = tl.zeros((ROWS, TOKENS), tl.int32)
            if CENTRED:
                rho = tl.zeros((ROWS, 16), tl.int32)
            for first in tl.range(0, segment, RUNS, num_stages=STAGES):
                e = start + first + tl.arange(0, RUNS)
                inside = (first + tl.arange(0, RUNS) < segment) & (e < runs)
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
        low_codes, low_x_scale, low_x_zero, low, low_scale, low_runs, low_segment, low_plane, low_bytes, low_slices,
        low_of_slice, low_groups, low_of_group,
        high_codes, high_x_scale, high_x_zero, high, high_scale, high_runs, high_segment, high_plane, high_bytes,
        high_slices, high_of_slice, high_groups, high_of_group,
        LOW: tl.constexpr, LOW_PLANES: tl.constexpr, LOW_CENTRED: tl.constexpr, LOW_ALIGN: tl.constexpr,
        LOW_RUNS: tl.constexpr,
        HIGH: tl.constexpr, HIGH_PLANES: tl.constexpr, HIGH_CENTRED: tl.constexpr, HIGH_ALIGN: tl.constexpr,
        HIGH_RUNS: tl.constexpr,
        TOKENS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """y[m, n], from both parts or, with HIGH 0 bits, from the low one."""
        n0, m0 = tl.program_id(0) * ROWS, tl.program_id(1) * TOKENS
        total = _add_part(
            tl.zeros((ROWS, TOKENS), tl.float32), m0, n0, M, N, low_codes, low_x_scale, low_x_zero, low, low_scale, low_runs,
            low_segment, low_plane, low_bytes, low_slices, low_of_slice, low_groups, low_of_group,
            LOW, LOW_PLANES, LOW_CENTRED, LOW_ALIGN, LOW_RUNS, TOKENS, ROWS, STAGES,
        )  # fmt: skip
        if HIGH:
            total = _add_part(
                total, m0, n0, M, N, high_codes, high_x_scale, high_x_zero, high, high_scale, high_runs, high_segment,
                high_plane, high_bytes, high_slices, high_of_slice, high_groups, high_of_group,
                HIGH, HIGH_PLANES, HIGH_CENTRED, HIGH_ALIGN, HIGH_RUNS, TOKENS, ROWS, STAGES,
            )  # fmt: skip
        m, n = tl.arange(0, TOKENS)[None, :], tl.arange(0, ROWS)[:, None]
        to = y + m0.to(tl.int64) * N + n0 + m * N + n
        tl.store(to, total.to(y.dtype.element_ty), mask=(n0 + n < N) & (m0 + m < M))


def product(seen: list[Codes], parts: list[Part], dtype: torch.dtype) -> Tensor:
    """`[M, N]` of the rounded inputs of every part."""
    tokens, rows = len(seen[0].codes), len(parts[0].packed)
    y = torch.empty(tokens, rows, dtype=dtype, device=seen[0].codes.device)
    arguments, described = [], []
    for codes, part in zip(seen, parts, strict=True):
        width, run, slices = part.width, planes(part.bits), codes.scale.shape[1]
        runs, group = -(-width // run), -(-(part.group_size or width) // run)
        segment = runs if part.segment >= width else part.segment // run
        align = gcd(16, runs, segment)
        described.append((part.bits, codes.zero is not None, align, segment))
        arguments += [
            codes.codes, codes.scale, codes.scale if codes.zero is None else codes.zero, part.packed, part.scale,
            runs // align, segment // align, codes.plane // 16, part.packed.shape[1], slices, -(-runs // slices),
            part.scale.shape[1], group,
        ]  # fmt: skip
    chosen = tile(tokens, [part.bits for part in parts], hopper())
    rounded_product[(triton.cdiv(rows, chosen.rows), triton.cdiv(tokens, chosen.tokens))](
        y, tokens, rows, *arguments, *(arguments if len(parts) == 1 else ()), **constants(chosen, described),
        num_warps=chosen.warps,
    )  # fmt: skip
    return y


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
        run = planes(bits or 8)
        most = 64 if run <= 2 else 32
        found |= {
            name: bits, f"{name}_PLANES": run, f"{name}_CENTRED": centred, f"{name}_ALIGN": align,
            f"{name}_RUNS": min(max(32, triton.next_power_of_2(segment)), most),  # int8 products take no fewer than 32
        }  # fmt: skip
    return found
