"""The Triton kernels of attention over packed groups of a KV cache; what they compute is `compress.kernels.group_attention`.

A program of `group_scores` takes one row of keys: it multiplies its scales into all queries of the head once, then cuts the
codes of `TOKENS` tokens at a time out of their bytes. A program of `group_sums` takes some tiles of `SUMMED` tokens and up
to `CHANNELS` channels of values, whose scales multiply the weights, once for every run of channels; of the products of all
channels with all runs' weights those of a channel's own run are kept, since tensor cores would otherwise stand idle. Sums of
programs are added up outside (split-KV).

Codes are the rows of a tile that tensor cores take as their first factor, so the queries that share a KV head share the
unpacking. A code is exact in bf16, and the other factor is three numbers of eight bits whose sum it is, so a product is as
exact as in fp32. Widths are multiples of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.gpu import as_words, hopper, processors, triton
from compress.kernels.gpu_products import WORD
from compress.kernels.layout import one_outer, outer_stride, tokens_of_row

TOKENS = 64  # of a row of keys, cut out at a time: as many rows as tensor cores of Hopper take at least
QUERIES = 16  # of a KV head at a time: registers hold no more; before Hopper half of them where a head is wider than WIDE
WIDE = 128
SUMMED, CHANNELS = 64, 128  # of group_sums, tokens at a time and channels of a program
COLUMNS = 16  # of its second factor, a query and a run each, at most; twice as many for TOKENS channels, then fewer channels
LEAST = 8  # queries: tensor cores take no fewer
PROGRAMS = 6  # of group_sums for every processor
WARPS = 4
WORDS = WORD | {8: torch.int64}  # eights of codes as one word

if triton:
    import triton.language as tl

    from compress.kernels.gpu import affine_at
    from compress.kernels.gpu_tiles import eights, numbers_of

    @triton.jit
    def _upper(x):
        """The first eight bits of the mantissa, which bf16 holds."""
        return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)

    @triton.jit
    def _times(code, x, total, KIND: tl.constexpr):
        """total + code x; KIND is bf16, or fp32 where there are no tensor cores (the interpreter)."""
        large = _upper(x)
        rest = x - large
        middle = _upper(rest)
        total = tl.dot(code, (rest - middle).to(KIND), total, input_precision="ieee")
        total = tl.dot(code, middle.to(KIND), total, input_precision="ieee")
        return tl.dot(code, large.to(KIND), total, input_precision="ieee")

    @triton.jit
    def _units(unit_pairs, o, EIGHT_BITS: tl.constexpr):
        """What 1.0 stands for in scales and in minima."""
        if EIGHT_BITS:
            return tl.load(unit_pairs + 2 * o), tl.load(unit_pairs + 2 * o + 1)
        else:
            return 1.0, 1.0

    @triton.jit
    def group_scores(
        query, packed, affine, unit_pairs, centre, scores, Q, scores_outer, scores_row,
        packed_outer, packed_row, affine_outer, affine_row,
        EIGHT_BITS: tl.constexpr, CENTRE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, QUERIES: tl.constexpr,
        WIDTH: tl.constexpr, PADDED: tl.constexpr, RUN: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr,
        KIND: tl.constexpr,
    ):  # fmt: skip
        """scores[o, q, r G + t] = query[o, q] . (code[o, r, t] scale[o, r] + minimum[o, r] (+ centre[o]))"""
        r, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        q, c, e, t = tl.arange(0, QUERIES), tl.arange(0, PADDED), tl.arange(0, PADDED // 8), tl.arange(0, TOKENS)
        inside, fits = c < WIDTH, (e < WIDTH // 8)[None, :]
        token_words: tl.constexpr = WIDTH // 8 * (1 if WORDS else BITS)
        row = packed + o * packed_outer + r * packed_row
        word = eights(row + t[:, None] * token_words, e, (t < G)[:, None] & fits, BITS, WORDS)
        pair = affine + o * affine_outer + r * affine_row + c // RUN
        scale_unit, start_unit = _units(unit_pairs, o, EIGHT_BITS)
        scale = affine_at(pair, inside, scale_unit, EIGHT_BITS)
        start = affine_at(pair + WIDTH // RUN, inside, start_unit, EIGHT_BITS)
        if CENTRE:
            start += tl.load(centre + o * WIDTH + c, mask=inside, other=0)
        at = query + (o * Q + q[None, :]) * WIDTH + c[:, None]
        x = tl.load(at, mask=(q < Q)[None, :] & inside[:, None], other=0)
        bias = tl.broadcast_to(tl.sum(x * start[:, None], 0)[None, :], (TOKENS, QUERIES))
        x *= scale[:, None]
        to = scores + o * scores_outer + q[None, :] * scores_row + r * G
        for _ in range(0, G, TOKENS):
            later = t + TOKENS  # asked for before the products of this step
            next_word = eights(row + later[:, None] * token_words, e, (later < G)[:, None] & fits, BITS, WORDS)
            score = _times(numbers_of(word, BITS, KIND), x, bias, KIND)
            tl.store(to + t[:, None], score, mask=(q < Q)[None, :] & (t < G)[:, None])
            word, t = next_word, later

    @triton.jit
    def group_sums(
        weights, packed, affine, unit_pairs, sums, Q, outer, rows, steps, weights_outer, weights_row,
        packed_outer, packed_row, affine_outer, affine_row,
        EIGHT_BITS: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
        CHANNELS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, TOKENS: tl.constexpr, KIND: tl.constexpr,
    ):  # fmt: skip
        """sums[p, o, q] = sum over the rows r of part p of weights[o, q, r] (code[o, r] scale[o, r] + minimum[o, r])"""
        p, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        c0 = tl.program_id(2) * CHANNELS
        c, e = c0 + tl.arange(0, CHANNELS), c0 // 8 + tl.arange(0, CHANNELS // 8)
        q, t, g = tl.arange(0, QUERIES), tl.arange(0, TOKENS), c0 // RUN + tl.arange(0, RUNS)
        fits, known = (e < WIDTH // 8)[None, :], (g < WIDTH // RUN)[None, :]
        first = p * steps * TOKENS
        left = (rows - first).to(tl.int32)
        row = packed + o * packed_outer + first * packed_row
        pair = affine + o * affine_outer + first * affine_row + g[None, :]
        at = weights + o * weights_outer + q[None, :] * weights_row + first
        scale_unit, start_unit = _units(unit_pairs, o, EIGHT_BITS)
        total, bias = tl.zeros((CHANNELS, RUNS * QUERIES), tl.float32), tl.zeros((TOKENS, RUNS, QUERIES), tl.float32)
        word = eights(row + t[:, None] * packed_row, e, (t < left)[:, None] & fits, BITS, WORDS)
        for _ in range(steps):
            here, pairs = (t < left)[:, None], pair + t[:, None] * affine_row
            scale = affine_at(pairs, here & known, scale_unit, EIGHT_BITS)
            start = affine_at(pairs + WIDTH // RUN, here & known, start_unit, EIGHT_BITS)
            weight = tl.load(at + t[:, None], mask=(q < Q)[None, :] & here, other=0)[:, None, :]
            t += TOKENS
            next_word = eights(row + t[:, None] * packed_row, e, (t < left)[:, None] & fits, BITS, WORDS)
            bias += weight * start[:, :, None]
            scaled = tl.reshape(weight * scale[:, :, None], (TOKENS, RUNS * QUERIES))
            total = _times(tl.trans(numbers_of(word, BITS, KIND)), scaled, total, KIND)
            word = next_word
        whole = tl.reshape(total, (CHANNELS, RUNS, QUERIES)) + tl.sum(bias, 0)[None, :, :]
        own = (c // RUN)[:, None, None] == g[None, :, None]
        to = sums + ((p * outer + o) * Q + q[None, :]) * WIDTH + c[:, None]
        tl.store(to, tl.sum(tl.where(own, whole, 0), 1), mask=(q < Q)[None, :] & (c < WIDTH)[:, None])


def write_scores(
    query: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, units: Tensor | None, centre: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Fill `[batch, heads, queries, tokens]` fp32; batch and heads of every tensor must be one dimension in memory."""
    batch, heads, queries, width = query.shape
    most = QUERIES if width <= WIDE or hopper() else QUERIES // 2
    if queries > most:
        for part, to in zip(query.split(most, dim=2), out.split(most, dim=2), strict=True):
            write_scores(part, packed, affine, bits, runs, units, centre, to)
        return
    query, kind = query.float().contiguous(), _kind(query)
    extra = [out if tensor is None else tensor.float().contiguous() for tensor in (units, centre)]
    tokens, codes = tokens_of_row(packed, bits, width), _words(packed, bits)
    group_scores[(packed.shape[2], batch * heads)](
        query, codes, affine, *extra, out, queries, outer_stride(out), out.stride(2), *_strides(codes, affine),
        EIGHT_BITS=units is not None, CENTRE=centre is not None, KIND=kind, num_warps=WARPS,
        **constants_of_scores(bits, queries, width, runs, tokens),
    )  # fmt: skip


def constants_of_scores(bits: int, queries: int, width: int, runs: int, tokens: int) -> dict[str, int]:
    """Those that the shapes decide."""
    sizes = {"WIDTH": width, "PADDED": power(width, 16), "RUN": width // runs, "G": tokens}
    few = {"QUERIES": power(queries, LEAST), "TOKENS": min(TOKENS, power(tokens, 16))}
    return {"BITS": bits, "WORDS": bits in WORDS} | sizes | few


def sums(weights: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, width: int, units: Tensor | None) -> Tensor:
    """`[batch, heads, queries, width]` fp32; a row of `packed` is one token."""
    batch, heads, queries, rows = weights.shape
    if queries > QUERIES:
        of_queries = weights.split(QUERIES, dim=2)
        return torch.cat([sums(part, packed, affine, bits, runs, width, units) for part in of_queries], dim=2)
    weights, codes, constants = weights.float(), _words(packed, bits), constants_of_sums(bits, queries, width, runs)
    if not one_outer(weights):
        weights = weights.contiguous()
    tiles, chunks = triton.cdiv(rows, SUMMED), triton.cdiv(width, constants["CHANNELS"])
    wanted = triton.cdiv(PROGRAMS * processors(weights.device), batch * heads * chunks)
    steps = triton.cdiv(tiles, min(tiles, wanted))
    parts = triton.cdiv(tiles, steps)
    out = torch.empty(parts, batch, heads, queries, width, dtype=torch.float32, device=weights.device)
    group_sums[(parts, batch * heads, chunks)](
        weights, codes, affine, out if units is None else units.float().contiguous(), out, queries, batch * heads, rows,
        steps, outer_stride(weights), weights.stride(2), *_strides(codes, affine),
        EIGHT_BITS=units is not None, KIND=_kind(weights), num_warps=WARPS, **constants,
    )  # fmt: skip
    return out.sum(dim=0)


def constants_of_sums(bits: int, queries: int, width: int, runs: int) -> dict[str, int]:
    """Those that the shapes decide: fewer channels where the products of their runs and the queries are many."""
    run, taken, channels = width // runs, power(queries), min(CHANNELS, power(width, 16))
    while channels > 16 and taken * _touched(channels, run, width) > (COLUMNS if channels > TOKENS else 2 * COLUMNS):
        channels //= 2
    touched = _touched(channels, run, width)
    sizes = {"WIDTH": width, "CHANNELS": channels, "RUN": run, "RUNS": touched, "TOKENS": SUMMED}
    return {"BITS": bits, "WORDS": bits in WORDS, "QUERIES": max(taken, LEAST // touched)} | sizes


def _touched(channels: int, run: int, width: int) -> int:
    """Runs that a program of so many channels meets, as a power of two."""
    starts = range(0, width, channels)
    return power(max((min(start + channels, width) - 1) // run - start // run + 1 for start in starts))


def power(size: int, least: int = 1) -> int:
    """A power of two that holds `size`."""
    return max(least, triton.next_power_of_2(size))


def _kind(x: Tensor) -> tl.dtype:
    """The interpreter knows no bf16."""
    return tl.bfloat16 if x.is_cuda else tl.float32


def _words(packed: Tensor, bits: int) -> Tensor:
    return as_words(packed, WORDS[bits]) if bits in WORDS else packed


def _strides(packed: Tensor, affine: Tensor) -> list[int]:
    return [stride for tensor in (packed, affine) for stride in (outer_stride(tensor), tensor.stride(2))]
