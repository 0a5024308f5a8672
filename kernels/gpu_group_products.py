"""The Triton kernels of the two products of attention with packed groups of a KV cache: `compress.kernels.group_attention`.

A program of `group_scores` takes one row of keys: it multiplies its scales into all queries of the head once, then cuts the
codes of `TOKENS` tokens at a time out of their bytes. A program of `group_sums` takes some tiles of `SUMMED` tokens and up
to `CHANNELS` channels of values, whose scales multiply the weights, once for every run of channels; of the products of all
channels with all runs' weights those of a channel's own run are kept, since tensor cores would otherwise stand idle. Its
weights are exponentials of scores less the highest of its own tokens; `gpu_attention` puts the programs' sums together.

Codes are the rows of a tile that tensor cores take as their first factor, so the queries that share a KV head share the
unpacking. Less the middle one a code is exact in bf16, and the other factor is three numbers of eight bits whose sum it is,
so a product is as exact as in fp32; two where the queries have 16 bits, and with them the output.
Widths are multiples of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.gpu import as_words, processors, triton
from compress.kernels.gpu_products import WORD
from compress.kernels.layout import outer_stride, tokens_of_row

TOKENS = 64  # of a row of keys, cut out at a time: as many rows as tensor cores of Hopper take at least
QUERIES = 16  # of a KV head at a time: registers hold no more, and half of them before Hopper
SUMMED, CHANNELS = 64, 128  # of group_sums, tokens at a time and channels of a program
COLUMNS = 16  # of its second factor, a query and a run each, at most; twice as many for TOKENS channels, then fewer channels
LEAST = 8  # queries: tensor cores take no fewer
PROGRAMS = 4  # of group_sums for every processor
WARPS = 4
WORDS = WORD | {8: torch.int64}  # eights of codes as one word

if triton:
    import triton.language as tl

    from compress.kernels.gpu import affine_at, affine_of
    from compress.kernels.gpu_tiles import eights, numbers_of

    @triton.jit
    def _upper(x):
        """The first eight bits of the mantissa, which bf16 holds."""
        return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)

    @triton.jit
    def _times(code, x, total, KIND: tl.constexpr, PARTS: tl.constexpr):
        """total + code x; KIND is bf16, or fp32 where there are no tensor cores (the interpreter)."""
        large = _upper(x)
        rest = x - large
        if PARTS == 3:
            middle = _upper(rest)
            total = tl.dot(code, (rest - middle).to(KIND), total, input_precision="ieee")
            rest = middle
        total = tl.dot(code, rest.to(KIND), total, input_precision="ieee")
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
        query, packed, affine, unit_pairs, centre, scores, scaling, Q, scores_outer,
        packed_outer, packed_row, affine_outer, affine_row,
        EIGHT_BITS: tl.constexpr, CENTRE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, QUERIES: tl.constexpr,
        WIDTH: tl.constexpr, PADDED: tl.constexpr, RUN: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr,
        KIND: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """scores[o, q, r G + t] = scaling query[o, q] . (code[o, r, t] scale[o, r] + minimum[o, r] (+ centre[o]))"""
        r, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        q, c, e, t = tl.arange(0, QUERIES), tl.arange(0, PADDED), tl.arange(0, PADDED // 8), tl.arange(0, TOKENS)
        inside, fits = c < WIDTH, (e < WIDTH // 8)[None, :]
        token_words: tl.constexpr = WIDTH // 8 * (1 if WORDS else BITS)
        half: tl.constexpr = 1 << (BITS - 1)
        row = packed + o * packed_outer + r * packed_row
        word = eights(row + t[:, None] * token_words, e, (t < G)[:, None] & fits, BITS, WORDS)
        pair = affine + o * affine_outer + r * affine_row + c // RUN
        scale_unit, start_unit = _units(unit_pairs, o, EIGHT_BITS)
        scale = affine_at(pair, inside, scale_unit, EIGHT_BITS)
        start = affine_at(pair + WIDTH // RUN, inside, start_unit, EIGHT_BITS) + half * scale
        if CENTRE:
            start += tl.load(centre + o * WIDTH + c, mask=inside, other=0)
        at = query + (o * Q + q[None, :]) * WIDTH + c[:, None]
        x = tl.load(at, mask=(q < Q)[None, :] & inside[:, None], other=0).to(tl.float32) * scaling
        bias = tl.broadcast_to(tl.sum(x * start[:, None], 0)[None, :], (TOKENS, QUERIES))
        x *= scale[:, None]
        to = scores + (o * Q + q[None, :]) * scores_outer + r * G
        for _ in range(0, G, TOKENS):
            later = t + TOKENS  # asked for before the products of this step
            next_word = eights(row + later[:, None] * token_words, e, (later < G)[:, None] & fits, BITS, WORDS)
            score = _times(numbers_of(word, half, BITS, KIND), x, bias, KIND, PARTS)
            tl.store(to + t[:, None], score, mask=(q < Q)[None, :] & (t < G)[:, None])
            word, t = next_word, later

    @triton.jit
    def group_sums(
        scores, packed, affine, unit_pairs, sums, totals, tops, Q, outer, rows, steps,
        packed_outer, packed_row, affine_outer, affine_row,
        EIGHT_BITS: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
        CHANNELS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, TOKENS: tl.constexpr, KIND: tl.constexpr,
        PARTS: tl.constexpr,
    ):  # fmt: skip
        """Of the rows r of part p the highest of scores[o, q, r] as tops[p, o, q], and the sums of weight = exp(score - top)
        and of weight (code[o, r] scale[o, r] + minimum[o, r])."""
        p, o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        c0 = tl.program_id(2) * CHANNELS
        c, e = c0 + tl.arange(0, CHANNELS), c0 // 8 + tl.arange(0, CHANNELS // 8)
        q, t, g = tl.arange(0, QUERIES), tl.arange(0, TOKENS), c0 // RUN + tl.arange(0, RUNS)
        fits, known, asked = (e < WIDTH // 8)[None, :], (g < WIDTH // RUN)[None, :], (q < Q)[None, :]
        half: tl.constexpr = 1 << (BITS - 1)
        first = p * steps * TOKENS
        left = (rows - first).to(tl.int32)
        row = packed + o * packed_outer + first * packed_row
        pair = affine + o * affine_outer + first * affine_row + g[None, :]
        at = scores + (o * Q + q[None, :]) * rows + first
        scale_unit, start_unit = _units(unit_pairs, o, EIGHT_BITS)
        # what a step reads is asked for before the step before it
        word = eights(row + t[:, None] * packed_row, e, (t < left)[:, None] & fits, BITS, WORDS)
        here = (t < left)[:, None]
        stored = tl.load(pair + t[:, None] * affine_row, mask=here & known, other=0)
        stored_start = tl.load(pair + WIDTH // RUN + t[:, None] * affine_row, mask=here & known, other=0)
        score = tl.load(at + t[:, None], mask=asked & here, other=float("-inf"))
        top = score
        for step in tl.range(1, steps, num_stages=1):
            later = t + step * TOKENS
            top = tl.maximum(top, tl.load(at + later[:, None], mask=asked & (later < left)[:, None], other=float("-inf")))
        top = tl.where(q < Q, tl.max(top, 0), 0)[None, :]
        total, bias = tl.zeros((CHANNELS, RUNS * QUERIES), tl.float32), tl.zeros((TOKENS, RUNS, QUERIES), tl.float32)
        whole = tl.zeros((TOKENS, 1, QUERIES), tl.float32)
        for _ in tl.range(0, steps, num_stages=1):
            t += TOKENS
            here = (t < left)[:, None]
            next_word = eights(row + t[:, None] * packed_row, e, here & fits, BITS, WORDS)
            next_stored = tl.load(pair + t[:, None] * affine_row, mask=here & known, other=0)
            next_start = tl.load(pair + WIDTH // RUN + t[:, None] * affine_row, mask=here & known, other=0)
            next_score = tl.load(at + t[:, None], mask=asked & here, other=float("-inf"))
            weight = tl.exp(score - top)[:, None, :]
            whole += weight
            scale = affine_of(stored, scale_unit, EIGHT_BITS)
            bias += weight * (affine_of(stored_start, start_unit, EIGHT_BITS) + half * scale)[:, :, None]
            scaled = tl.reshape(weight * scale[:, :, None], (TOKENS, RUNS * QUERIES))
            total = _times(tl.trans(numbers_of(word, half, BITS, KIND)), scaled, total, KIND, PARTS)
            word, stored, stored_start, score = next_word, next_stored, next_start, next_score
        found = tl.reshape(total, (CHANNELS, RUNS, QUERIES)) + tl.sum(bias, 0)[None, :, :]
        own = (c // RUN)[:, None, None] == g[None, :, None]
        to = (p * outer + o) * Q + q[None, :]
        tl.store(sums + to * WIDTH + c[:, None], tl.sum(tl.where(own, found, 0), 1), mask=asked & (c < WIDTH)[:, None])
        if c0 == 0:
            tl.store(totals + to, tl.sum(whole, 0), mask=asked)
            tl.store(tops + to, top, mask=asked)


def scores(
    query: Tensor, scaling: float, packed: Tensor, affine: Tensor, bits: int, runs: int, units: Tensor | None,
    centre: Tensor | None,
) -> Tensor:  # fmt: skip
    """`[batch, heads, queries, tokens]` fp32, of `most_queries` at most; batch and heads must be one dimension in memory."""
    batch, heads, queries, width = query.shape
    tokens, codes = tokens_of_row(packed, bits, width), _words(packed, bits)
    rows = packed.shape[2]
    out = torch.empty(batch, heads, queries, rows * tokens, dtype=torch.float32, device=query.device)
    extra = [out if tensor is None else tensor.float().contiguous() for tensor in (units, centre)]
    group_scores[(rows, batch * heads)](
        query.contiguous(), codes, affine, *extra, out, scaling, queries, rows * tokens, *_strides(codes, affine),
        EIGHT_BITS=units is not None, CENTRE=centre is not None, KIND=_kind(query), num_warps=WARPS,
        **constants_of_scores(bits, queries, width, runs, tokens, query.dtype),
    )  # fmt: skip
    return out


def sums(
    scores: Tensor,
    dtype: torch.dtype,
    packed: Tensor,
    affine: Tensor,
    bits: int,
    runs: int,
    width: int,
    units: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some parts of the tokens `[parts, batch, heads, queries, width]` fp32, and `[parts, batch, heads, queries]` of the
    weights, and the highest scores. A row of `packed` is one token; `dtype`: of the queries."""
    batch, heads, queries, rows = scores.shape
    codes, constants = _words(packed, bits), constants_of_sums(bits, queries, width, runs, dtype)
    tiles, chunks = triton.cdiv(rows, SUMMED), triton.cdiv(width, constants["CHANNELS"])
    wanted = triton.cdiv(PROGRAMS * processors(scores.device), batch * heads * chunks)
    steps = triton.cdiv(tiles, min(tiles, wanted))
    out = scores.new_empty(triton.cdiv(tiles, steps), batch, heads, queries, width)
    totals, tops = (scores.new_empty(out.shape[:-1]) for _ in range(2))
    group_sums[(len(out), batch * heads, chunks)](
        scores, codes, affine, out if units is None else units.float().contiguous(), out, totals, tops, queries,
        batch * heads, rows, steps, *_strides(codes, affine),
        EIGHT_BITS=units is not None, KIND=_kind(scores), num_warps=WARPS, **constants,
    )  # fmt: skip
    return out, totals, tops


def most_queries(large: bool) -> int:
    """Of a KV head at a time; `large`: on Hopper."""
    return QUERIES if large else QUERIES // 2


def constants_of_scores(bits: int, queries: int, width: int, runs: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Those that the shapes decide, and the dtype of the queries."""
    sizes = {"WIDTH": width, "PADDED": power(width, 16), "RUN": width // runs, "G": tokens}
    few = {"QUERIES": power(queries, LEAST), "TOKENS": min(TOKENS, power(tokens, 16))}
    return {"BITS": bits, "WORDS": bits in WORDS, "PARTS": _parts(dtype)} | sizes | few


def constants_of_sums(bits: int, queries: int, width: int, runs: int, dtype: torch.dtype) -> dict[str, int]:
    """The same: fewer channels where the products of their runs and the queries are many."""
    run, taken, channels = width // runs, power(queries), min(CHANNELS, power(width, 16))
    while channels > 16 and taken * _touched(channels, run, width) > (COLUMNS if channels > TOKENS else 2 * COLUMNS):
        channels //= 2
    touched = _touched(channels, run, width)
    sizes = {"WIDTH": width, "CHANNELS": channels, "RUN": run, "RUNS": touched, "TOKENS": SUMMED}
    return {"BITS": bits, "WORDS": bits in WORDS, "PARTS": _parts(dtype), "QUERIES": max(taken, LEAST // touched)} | sizes


def _touched(channels: int, run: int, width: int) -> int:
    """Runs that a program of so many channels meets, as a power of two."""
    starts = range(0, width, channels)
    return power(max((min(start + channels, width) - 1) // run - start // run + 1 for start in starts))


def power(size: int, least: int = 1) -> int:
    """A power of two that holds `size`."""
    return max(least, triton.next_power_of_2(size))


def _parts(dtype: torch.dtype) -> int:
    return 3 if dtype == torch.float32 else 2


def _kind(x: Tensor) -> tl.dtype:
    """The interpreter knows no bf16."""
    return tl.bfloat16 if x.is_cuda else tl.float32


def _words(packed: Tensor, bits: int) -> Tensor:
    return as_words(packed, WORDS[bits]) if bits in WORDS else packed


def _strides(packed: Tensor, affine: Tensor) -> list[int]:
    return [stride for tensor in (packed, affine) for stride in (outer_stride(tensor), tensor.stride(2))]
