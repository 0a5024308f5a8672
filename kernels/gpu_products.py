"""The Triton kernels of packed weights: products with up to `MOST_TOKENS` tokens, and weights multiplied out for more. One
token has a kernel of its own (`gpu_decode`).

A program takes `ROWS` rows and some steps of `8 EIGHTS` columns, and cuts a tile of numbers out (`gpu_tiles`), which meets
the inputs on tensor cores: few tokens leave most of them idle, but reading a weight once and cutting it out once is what
decoding costs, and up to 16 tokens are free. A code has few bits, so it is exact in the inputs' dtype, sums are fp32 and a
group's scale multiplies its sum. Groups that hold no step scale the tile, in fp32.

A matrix of few rows does not fill a GPU: programs then share its columns, each writes fp32 sums of its own, and `add_up`
adds them in order, so the same inputs give the same bits. Above `MOST_TOKENS` cuBLAS multiplies by the expanded weight.

Legend: M tokens, N output neurons, K columns (atoms of a sparse row), G groups, P programs that share the columns of a row.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels import gpu_decode
from compress.kernels.gpu import added_up, as_words, hopper, precision, shares, triton

MOST_TOKENS = 64
ROWS, COLUMNS, LEAST_COLUMNS = 64, 128, 32  # of a program, at a time
WARPS = 4
WORD = {2: torch.int16, 4: torch.int32}  # widths whose eights are whole words

if triton:
    import triton.language as tl

    from compress.kernels.gpu_tiles import stored_of, tile_of, values_before

    @triton.jit
    def _group(k, units, unit_groups, group_size):
        """The group of column k; those of the learned atoms begin anew."""
        return tl.where(k < units, k // group_size, unit_groups + (k - units) // group_size)

    @triton.jit
    def _factors(scale, n, groups, step, K, units, unit_groups, group_size, here, ROWS: tl.constexpr, EIGHTS: tl.constexpr):
        """The scale of every number of a tile, fp32."""
        e = step * EIGHTS + tl.arange(0, EIGHTS)
        group = _group(8 * e, units, unit_groups, group_size)
        used = here[:, None] & (8 * e < K)[None, :]
        factor = tl.load(scale + n[:, None] * groups + group[None, :], mask=used, other=0).to(tl.float32)
        return tl.reshape(tl.broadcast_to(factor[:, :, None], (ROWS, EIGHTS, 8)), (ROWS, 8 * EIGHTS))

    @triton.jit
    def _inputs(x, x_stride, m, there, step, stop, EIGHTS: tl.constexpr):
        """The inputs of a step, [TOKENS, 8 EIGHTS]."""
        k = step * 8 * EIGHTS + tl.arange(0, 8 * EIGHTS)
        at = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
        return tl.load(at, mask=there[:, None] & (k < stop)[None, :], other=0)

    @triton.jit
    def _add_step(
        total, seen, weight, scale, n, groups, step, stop, units, unit_groups, group_size, here,
        BITS: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """total[n, m] plus the products of a step."""
        if SCALED:
            weight *= _factors(scale, n, groups, step, stop, units, unit_groups, group_size, here, ROWS, EIGHTS)
        seen = tl.trans(seen.to(weight.dtype))
        if SCALED or BITS == 16:
            return tl.dot(weight, seen, total, input_precision=PRECISION)
        else:
            group = _group(step * 8 * EIGHTS, units, unit_groups, group_size)
            factor = tl.load(scale + n * groups + tl.minimum(group, groups - 1), mask=here, other=0).to(tl.float32)
            return total + tl.dot(weight, seen, input_precision=PRECISION) * factor[:, None]

    @triton.jit
    def packed_product(
        x, values, scale, mask, y, M, N, K, row_values, mask_bytes, units, groups, unit_groups, group_size, x_stride, steps,
        BITS: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
        EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """y[p, m, n] = the sum over the columns of program p of x[m, k] weight[n, k]; what two steps read is asked for at
        once, so that they wait for memory together."""
        n, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
        p = tl.program_id(1)
        here, there = n < N, m < M
        exact: tl.constexpr = SCALED or (BITS == 16 and x.dtype.element_ty == tl.float16)  # of what is read
        kind: tl.constexpr = tl.float32 if exact else x.dtype.element_ty
        first, last = p * steps, tl.minimum((p + 1) * steps, tl.cdiv(K, 8 * EIGHTS))
        stop = tl.minimum(last * 8 * EIGHTS, K)
        before = tl.zeros((ROWS,), tl.int32)
        if MASKED:
            before = values_before(mask, mask_bytes, n, first * EIGHTS, here, ROWS, EIGHTS)
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        for step in tl.range(first, last, 2, num_stages=1):
            stored = stored_of(values, row_values, mask, mask_bytes, n, step, stop, here, BITS, MASKED, EIGHTS)
            next_stored = stored_of(values, row_values, mask, mask_bytes, n, step + 1, stop, here, BITS, MASKED, EIGHTS)
            seen = _inputs(x, x_stride, m, there, step, stop, EIGHTS)
            next_seen = _inputs(x, x_stride, m, there, step + 1, stop, EIGHTS)
            weight, before = tile_of(stored, values, row_values, before, n, BITS, MASKED, kind)
            total = _add_step(
                total, seen, weight, scale, n, groups, step, stop, units, unit_groups, group_size, here, BITS, SCALED, ROWS,
                EIGHTS, PRECISION,
            )  # fmt: skip
            weight, before = tile_of(next_stored, values, row_values, before, n, BITS, MASKED, kind)
            total = _add_step(
                total, next_seen, weight, scale, n, groups, step + 1, stop, units, unit_groups, group_size, here, BITS,
                SCALED, ROWS, EIGHTS, PRECISION,
            )  # fmt: skip
        to = y + (p.to(tl.int64) * M + m[None, :]) * N + n[:, None]
        tl.store(to, total.to(y.dtype.element_ty), mask=here[:, None] & there[None, :])

    @triton.jit
    def packed_expand(
        values, scale, mask, out, N, K, row_values, mask_bytes, units, groups, unit_groups, group_size, out_stride, steps,
        BITS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ):  # fmt: skip
        """out[n, k] = weight[n, k], in the dtype of out."""
        n, p = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        here = n < N
        first, last = p * steps, tl.minimum((p + 1) * steps, tl.cdiv(K, 8 * EIGHTS))
        before = tl.zeros((ROWS,), tl.int32)
        if MASKED:
            before = values_before(mask, mask_bytes, n, first * EIGHTS, here, ROWS, EIGHTS)
        for step in tl.range(first, last, num_stages=1):
            stored = stored_of(values, row_values, mask, mask_bytes, n, step, K, here, BITS, MASKED, EIGHTS)
            weight, before = tile_of(stored, values, row_values, before, n, BITS, MASKED, tl.float32)
            if BITS < 16:
                weight *= _factors(scale, n, groups, step, K, units, unit_groups, group_size, here, ROWS, EIGHTS)
            k = step * 8 * EIGHTS + tl.arange(0, 8 * EIGHTS)
            to = out + n.to(tl.int64)[:, None] * out_stride + k[None, :]
            tl.store(to, weight.to(out.dtype.element_ty), mask=here[:, None] & (k < K)[None, :])


class Weight:
    """A packed weight as the kernels take it; groups must be multiples of 8, and so the units before learned atoms."""

    def __init__(
        self, values: Tensor, scale: Tensor | None, bits: int, columns: int, group_size: int,
        mask: Tensor | None = None, units: int | None = None,
    ):  # fmt: skip
        self.columns, self.rows = columns, len(values)
        units, group = columns if units is None else units, group_size or columns
        whole = scale is None or group >= columns
        fit = COLUMNS if whole else math.gcd(group, COLUMNS)
        parted = scale is not None and 0 < units < columns and units % fit != 0
        self.scaled = scale is not None and (fit < LEAST_COLUMNS or parted)
        self.fit = COLUMNS if self.scaled else fit  # columns that a step may take
        stored = as_words(values, WORD[bits]) if bits in WORD and mask is None else values
        spare = values if scale is None else scale  # never read
        self.tensors = stored, spare, values if mask is None else mask
        self.sizes = (
            columns, stored.shape[1], 0 if mask is None else mask.shape[1], units, 0 if scale is None else scale.shape[1],
            -(-units // group), group,
        )  # fmt: skip
        self.constants = {"BITS": bits, "MASKED": mask is not None, "ROWS": ROWS}

    def shares(self, step: int, tiles: int, tokens: int) -> tuple[int, int]:
        """How many programs share the columns of a row, and the steps of each, where `tiles` take all rows once."""
        values = self.tensors[0]
        row_bytes = values.shape[1] * values.element_size()
        return shares(-(-self.columns // step), WARPS * tiles, tokens, row_bytes, values.device)


class Tile(NamedTuple):
    """Tokens of a program and columns of a step."""

    tokens: int
    columns: int


def tile(tokens: int, scaled: bool, large: bool) -> Tile:
    """The largest that the tokens fill and that does not spill; Hopper multiplies out of shared memory."""
    most = MOST_TOKENS if large else 16 if scaled else 32
    taken = min(most, max(16, 1 << (tokens - 1).bit_length()))
    return Tile(taken, COLUMNS // 2 if scaled or taken > 16 else COLUMNS)


def product(x_MK: Tensor, *weights: Weight) -> Tensor:
    """`[M, N]` in the dtype of the inputs; the columns of several weights follow each other."""
    stops = list(accumulate(weight.columns for weight in weights))
    slices = [slice(stop - weight.columns, stop) for stop, weight in zip(stops, weights, strict=True)]
    if len(x_MK) <= gpu_decode.MOST_TOKENS:
        return _decoded([x_MK[:, columns] for columns in slices], weights)
    if len(x_MK) <= MOST_TOKENS:
        return _product([x_MK[:, columns] for columns in slices], weights)
    dense = torch.empty(weights[0].rows, x_MK.shape[1], dtype=x_MK.dtype, device=x_MK.device)
    for weight, columns in zip(weights, slices, strict=True):
        expanded(weight, dense[:, columns])
    return x_MK @ dense.T


def expanded(weight: Weight, out_NK: Tensor) -> None:
    """Write a weight multiplied out into `[N, K]`, which may be a slice of columns."""
    tiles = triton.cdiv(weight.rows, ROWS)
    step = min(weight.fit, COLUMNS if hopper() else COLUMNS // 2)
    programs, steps = weight.shares(step, tiles, 1)  # no sums are written
    packed_expand[(tiles, programs)](
        *weight.tensors, out_NK, weight.rows, *weight.sizes, out_NK.stride(0), steps,
        **weight.constants, EIGHTS=step // 8, num_warps=WARPS,
    )  # fmt: skip


def _decoded(inputs: list[Tensor], weights: tuple[Weight, ...]) -> Tensor:
    tokens, like = len(inputs[0]), inputs[0]
    dtype = like.dtype if len(weights) == 1 else torch.float32
    sums = torch.empty(len(weights), tokens, weights[0].rows, dtype=dtype, device=like.device)
    for x, weight, y in zip(inputs, weights, sums, strict=True):
        gpu_decode.write_product(x, weight, y)
    return sums[0] if len(weights) == 1 else added_up(sums, like.dtype)


def _product(inputs: list[Tensor], weights: tuple[Weight, ...]) -> Tensor:
    (tokens, _), rows, like = inputs[0].shape, weights[0].rows, inputs[0]
    launches, count = [], 0
    for x, weight in zip(inputs, weights, strict=True):
        taken = tile(tokens, weight.scaled, hopper())
        step, tiles = min(weight.fit, taken.columns), (triton.cdiv(rows, ROWS), triton.cdiv(tokens, taken.tokens))
        programs, steps = weight.shares(step, math.prod(tiles), tokens)
        launches.append((x, weight, taken.tokens, step, (tiles[0], programs, tiles[1]), steps, count))
        count += programs
    sums = torch.empty(count, tokens, rows, dtype=like.dtype if count == 1 else torch.float32, device=like.device)
    for x, weight, taken, step, grid, steps, first in launches:
        packed_product[grid](
            x, *weight.tensors, sums[first:], tokens, rows, *weight.sizes, x.stride(0), steps,
            **weight.constants, EIGHTS=step // 8, SCALED=weight.scaled, TOKENS=taken, PRECISION=precision(), num_warps=WARPS,
        )  # fmt: skip
    return sums[0] if count == 1 else added_up(sums, like.dtype)
