"""The Triton kernels of attention over packed groups of a KV cache; what they compute is `compress.kernels.group_attention`.

A program of `group_scores` takes one row of keys: it multiplies its scales into all queries of the head once, then cuts the
codes of `TOKENS` tokens at a time out of their bytes and meets them by a matrix product, so the queries that share a KV head
share the unpacking. A program of `group_sums` takes some hundred tokens and `CHANNELS` channels of values; its sums are
added up outside (split-KV). A whole number of up to 255 is exact in tf32, the other factor is split in three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.gpu import precision, triton
from compress.kernels.layout import outer_stride, tokens_of_row

TOKENS = 32  # cut out at a time
QUERIES = 16  # of a KV head at a time: tensor cores take no fewer, and the registers of wide heads no more
PART, CHANNELS = 512, 64  # tokens and channels of a program of group_sums
WARPS = 4

if triton:
    import triton.language as tl

    from compress.kernels.gpu import _affine

    @triton.jit
    def _cut(row, k, inside, BITS: tl.constexpr):
        """Codes k of rows, fp32: the byte each begins in, and the next where it does not end there."""
        shift = (k * BITS) % 8
        at = row + (k * BITS) // 8
        code = tl.load(at, mask=inside, other=0).to(tl.int32) >> shift
        if 8 % BITS != 0:
            code |= tl.load(at + 1, mask=inside & (shift + BITS > 8), other=0).to(tl.int32) << (8 - shift)
        return (code & ((1 << BITS) - 1)).to(tl.float32)

    @triton.jit
    def group_scores(
        query, packed, affine, unit_pairs, centre, scores, Q, rows, G, width, run, runs,
        packed_outer, packed_row, affine_outer, affine_row,
        EIGHT_BITS: tl.constexpr, CENTRE: tl.constexpr, BITS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
        TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """scores[o, q, r G + t] = query[o, q] . (code[o, r, t] scale[o, r] + minimum[o, r] (+ centre[o]))"""
        r, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        q, c = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
        inside = c < width
        pair = affine + o * affine_outer + r * affine_row + c // run
        scale_unit, start_unit = 1.0, 1.0
        if EIGHT_BITS:
            scale_unit, start_unit = tl.load(unit_pairs + 2 * o), tl.load(unit_pairs + 2 * o + 1)
        scale = _affine(pair, inside, scale_unit, EIGHT_BITS)
        start = _affine(pair + runs, inside, start_unit, EIGHT_BITS)
        if CENTRE:
            start += tl.load(centre + o * width + c, mask=inside, other=0)
        from_query = query + (o * Q + q[:, None]) * width + c[None, :]
        x = tl.load(from_query, mask=(q < Q)[:, None] & inside[None, :], other=0)
        bias = tl.sum(x * start[None, :], 1)
        x *= scale[None, :]
        row = packed + o * packed_outer + r * packed_row
        for first in range(0, G, TOKENS):
            t = first + tl.arange(0, TOKENS)
            used = (t < G)[:, None] & inside[None, :]
            code = _cut(row, t[:, None] * width + c[None, :], used, BITS)
            score = tl.dot(x, tl.trans(code), input_precision=PRECISION) + bias[:, None]
            to = scores + (o * Q + q[:, None]) * rows * G + r * G + t[None, :]
            tl.store(to, score, mask=(q < Q)[:, None] & (t < G)[None, :])

    @triton.jit
    def group_sums(
        weights, packed, affine, unit_pairs, sums, Q, outer, rows, width, run, runs,
        packed_outer, packed_row, affine_outer, affine_row,
        EIGHT_BITS: tl.constexpr, BITS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
        PART: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """sums[p, o, q] = sum over the rows r of part p of weights[o, q, r] (code[o, r] scale[o, r] + minimum[o, r])"""
        p, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        q, c = tl.arange(0, QUERIES), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        inside = c < width
        scale_unit, start_unit = 1.0, 1.0
        if EIGHT_BITS:
            scale_unit, start_unit = tl.load(unit_pairs + 2 * o), tl.load(unit_pairs + 2 * o + 1)
        total = tl.zeros((QUERIES, CHANNELS), dtype=tl.float32)
        for first in range(0, PART, TOKENS):
            r = p * PART + first + tl.arange(0, TOKENS)
            used = (r < rows)[:, None] & inside[None, :]
            row = packed + o * packed_outer + r[:, None] * packed_row
            pair = affine + o * affine_outer + r[:, None] * affine_row + (c // run)[None, :]
            scale = _affine(pair, used, scale_unit, EIGHT_BITS)
            value = _cut(row, c[None, :], used, BITS) * scale + _affine(pair + runs, used, start_unit, EIGHT_BITS)
            at = weights + (o * Q + q[:, None]) * rows + r[None, :]
            weight = tl.load(at, mask=(q < Q)[:, None] & (r < rows)[None, :], other=0)
            total += tl.dot(weight, value, input_precision=PRECISION)
        to = sums + ((p * outer + o) * Q + q[:, None]) * width + c[None, :]
        tl.store(to, total, mask=(q < Q)[:, None] & inside[None, :])


def scores(
    query: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, units: Tensor | None, centre: Tensor | None
) -> Tensor:
    """`[batch, heads, queries, tokens]` fp32; batch and heads of every tensor must be one dimension in memory."""
    batch, heads, queries, width = query.shape
    if queries > QUERIES:
        parts = query.split(QUERIES, dim=2)
        return torch.cat([scores(part, packed, affine, bits, runs, units, centre) for part in parts], dim=2)
    rows = packed.shape[2]
    tokens = tokens_of_row(packed, bits, width)
    query = query.float().contiguous()
    out = torch.empty(batch, heads, queries, rows * tokens, device=query.device)
    extra = [out if tensor is None else tensor.float().contiguous() for tensor in (units, centre)]
    group_scores[(rows, batch * heads)](
        query, packed, affine, *extra, out, queries, rows, tokens, width, width // runs, runs, *_strides(packed, affine),
        EIGHT_BITS=units is not None, CENTRE=centre is not None, BITS=bits, QUERIES=QUERIES,
        WIDTH=power(width), TOKENS=TOKENS, PRECISION=precision(), num_warps=WARPS,
    )  # fmt: skip
    return out


def sums(weights: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, width: int, units: Tensor | None) -> Tensor:
    """`[batch, heads, queries, width]` fp32; a row of `packed` is one token."""
    batch, heads, queries, rows = weights.shape
    if queries > QUERIES:
        of_queries = weights.split(QUERIES, dim=2)
        return torch.cat([sums(part, packed, affine, bits, runs, width, units) for part in of_queries], dim=2)
    weights, parts = weights.float().contiguous(), triton.cdiv(rows, PART)
    out = torch.empty(parts, batch, heads, queries, width, device=weights.device)
    group_sums[(parts, batch * heads, triton.cdiv(width, CHANNELS))](
        weights, packed, affine, out if units is None else units.float().contiguous(), out, queries, batch * heads, rows,
        width, width // runs, runs, *_strides(packed, affine),
        EIGHT_BITS=units is not None, BITS=bits, QUERIES=QUERIES, CHANNELS=CHANNELS, TOKENS=TOKENS, PART=PART,
        PRECISION=precision(), num_warps=WARPS,
    )  # fmt: skip
    return out.sum(dim=0)


def power(size: int, least: int = 1) -> int:
    """A power of two that holds `size`."""
    return max(least, triton.next_power_of_2(size))


def _strides(packed: Tensor, affine: Tensor) -> list[int]:
    return [stride for tensor in (packed, affine) for stride in (outer_stride(tensor), tensor.stride(2))]
