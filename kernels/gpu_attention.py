"""The Triton kernels of attention over packed groups of a KV cache; what they compute is `compress.kernels.group_attention`.

A program of `group_scores` takes one row of keys: it multiplies its scales into all queries of the head once, then cuts the
codes of `TOKENS` tokens at a time out of their bytes and meets them by a matrix product, so the queries that share a KV head
share the unpacking. A program of `group_sums` takes some hundred tokens and `CHANNELS` channels of values, which share their
scales where that can be, so that these multiply the weights; its sums are added up outside (split-KV). A whole number of up
to 255 is exact in tf32, the other factor is split in two. Widths are multiples of 8.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from compress.kernels.gpu import precision, triton
from compress.kernels.layout import outer_stride, tokens_of_row

TOKENS = 32  # of a row of keys, cut out at a time
QUERIES = 16  # of a KV head at a time: tensor cores take no fewer, and the registers of wide heads no more
PART, CHANNELS, SUMMED = 512, 64, 128  # tokens and channels of a program of group_sums, tokens at a time
WARPS = 4

if triton:
    import triton.language as tl

    from compress.kernels.gpu import affine_at
    from compress.kernels.gpu_tiles import codes_of

    @triton.jit
    def _times_codes(x, code, total, PRECISION: tl.constexpr):
        """total + x code: a code is exact in tf32, x is split in two parts."""
        if PRECISION == "ieee":
            return tl.dot(x, code, total, input_precision="ieee")
        else:
            large = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            return tl.dot(large, code, tl.dot(x - large, code, total, input_precision="tf32"), input_precision="tf32")

    @triton.jit
    def group_scores(
        query, packed, affine, unit_pairs, centre, scores, Q, rows, G, width, run, runs,
        packed_outer, packed_row, affine_outer, affine_row,
        EIGHT_BITS: tl.constexpr, CENTRE: tl.constexpr, BITS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
        TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """scores[o, q, r G + t] = query[o, q] . (code[o, r, t] scale[o, r] + minimum[o, r] (+ centre[o]))"""
        r, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        q, c, e = tl.arange(0, QUERIES), tl.arange(0, WIDTH), tl.arange(0, WIDTH // 8)
        inside = c < width
        row = packed + o * packed_outer + r * packed_row
        pair = affine + o * affine_outer + r * affine_row + c // run
        scale_unit, start_unit = 1.0, 1.0
        if EIGHT_BITS:
            scale_unit, start_unit = tl.load(unit_pairs + 2 * o), tl.load(unit_pairs + 2 * o + 1)
        scale = affine_at(pair, inside, scale_unit, EIGHT_BITS)
        start = affine_at(pair + runs, inside, start_unit, EIGHT_BITS)
        if CENTRE:
            start += tl.load(centre + o * width + c, mask=inside, other=0)
        from_query = query + (o * Q + q[:, None]) * width + c[None, :]
        x = tl.load(from_query, mask=(q < Q)[:, None] & inside[None, :], other=0)
        bias = tl.broadcast_to(tl.sum(x * start[None, :], 1)[:, None], (QUERIES, TOKENS))
        x *= scale[None, :]
        for first in range(0, G, TOKENS):
            t = first + tl.arange(0, TOKENS)
            used = (t < G)[:, None] & (8 * e < width)[None, :]
            code = codes_of(row + t[:, None] * (width // 8 * BITS), e, used, BITS).to(tl.float32)
            score = _times_codes(x, tl.trans(code), bias, PRECISION)
            to = scores + (o * Q + q[:, None]) * rows * G + r * G + t[None, :]
            tl.store(to, score, mask=(q < Q)[:, None] & (t < G)[None, :])

    @triton.jit
    def group_sums(
        weights, packed, affine, unit_pairs, sums, Q, outer, rows, width, run, runs,
        packed_outer, packed_row, affine_outer, affine_row,
        EIGHT_BITS: tl.constexpr, BITS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
        PART: tl.constexpr, ONE_RUN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """sums[p, o, q] = sum over the rows r of part p of weights[o, q, r] (code[o, r] scale[o, r] + minimum[o, r])"""
        p, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        q, c0 = tl.arange(0, QUERIES), tl.program_id(2) * CHANNELS
        c, e = c0 + tl.arange(0, CHANNELS), c0 // 8 + tl.arange(0, CHANNELS // 8)
        inside = c < width
        scale_unit, start_unit = 1.0, 1.0
        if EIGHT_BITS:
            scale_unit, start_unit = tl.load(unit_pairs + 2 * o), tl.load(unit_pairs + 2 * o + 1)
        total, bias = tl.zeros((QUERIES, CHANNELS), dtype=tl.float32), tl.zeros((QUERIES,), dtype=tl.float32)
        for first in range(0, PART, TOKENS):
            r = p * PART + first + tl.arange(0, TOKENS)
            here = r < rows
            row = packed + o * packed_outer + r[:, None] * packed_row
            pair = affine + o * affine_outer + r * affine_row
            at = weights + (o * Q + q[:, None]) * rows + r[None, :]
            weight = tl.load(at, mask=(q < Q)[:, None] & here[None, :], other=0)
            code = codes_of(row, e, here[:, None] & (8 * e < width)[None, :], BITS).to(tl.float32)
            if ONE_RUN:  # the program's channels share their scales
                pair += c0 // run
                bias += tl.sum(weight * affine_at(pair + runs, here, start_unit, EIGHT_BITS)[None, :], 1)
                weight *= affine_at(pair, here, scale_unit, EIGHT_BITS)[None, :]
                total = _times_codes(weight, code, total, PRECISION)
            else:
                used, pairs = here[:, None] & inside[None, :], pair[:, None] + (c // run)[None, :]
                value = code * affine_at(pairs, used, scale_unit, EIGHT_BITS)
                value += affine_at(pairs + runs, used, start_unit, EIGHT_BITS)
                total = tl.dot(weight, value, total, input_precision=PRECISION)
        to = sums + ((p * outer + o) * Q + q[:, None]) * width + c[None, :]
        tl.store(to, total + bias[:, None], mask=(q < Q)[:, None] & inside[None, :])


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
    out = torch.empty(batch, heads, queries, rows * tokens, dtype=torch.float32, device=query.device)
    extra = [out if tensor is None else tensor.float().contiguous() for tensor in (units, centre)]
    group_scores[(rows, batch * heads)](
        query, packed, affine, *extra, out, queries, rows, tokens, width, width // runs, runs, *_strides(packed, affine),
        EIGHT_BITS=units is not None, CENTRE=centre is not None, BITS=bits, QUERIES=QUERIES,
        WIDTH=power(width, 16), TOKENS=TOKENS, PRECISION=precision(), num_warps=WARPS,
    )  # fmt: skip
    return out


def sums(weights: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, width: int, units: Tensor | None) -> Tensor:
    """`[batch, heads, queries, width]` fp32; a row of `packed` is one token."""
    batch, heads, queries, rows = weights.shape
    if queries > QUERIES:
        of_queries = weights.split(QUERIES, dim=2)
        return torch.cat([sums(part, packed, affine, bits, runs, width, units) for part in of_queries], dim=2)
    weights, parts, run = weights.float().contiguous(), triton.cdiv(rows, PART), width // runs
    one_run = run % 16 == 0
    channels = gcd(run, CHANNELS) if one_run else CHANNELS
    out = torch.empty(parts, batch, heads, queries, width, dtype=torch.float32, device=weights.device)
    group_sums[(parts, batch * heads, triton.cdiv(width, channels))](
        weights, packed, affine, out if units is None else units.float().contiguous(), out, queries, batch * heads, rows,
        width, run, runs, *_strides(packed, affine),
        EIGHT_BITS=units is not None, BITS=bits, QUERIES=QUERIES, CHANNELS=channels, ONE_RUN=one_run,
        TOKENS=SUMMED if one_run else TOKENS, PART=PART, PRECISION=precision(), num_warps=WARPS,
    )  # fmt: skip
    return out.sum(dim=0)


def power(size: int, least: int = 1) -> int:
    """A power of two that holds `size`."""
    return max(least, triton.next_power_of_2(size))


def _strides(packed: Tensor, affine: Tensor) -> list[int]:
    return [stride for tensor in (packed, affine) for stride in (outer_stride(tensor), tensor.stride(2))]
