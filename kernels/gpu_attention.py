"""Attention with packed groups of a KV cache on a GPU, in three launches (`compress.kernels.group_attention`).

The products with packed keys and values are `gpu_group_products`, split over parts of the tokens. Here a program takes some
channels of one KV head, gives every part's sums the weight that its highest score has beside all others, and adds the tokens
that are not packed, which it meets tile by tile as they came: softmax and sums are never written for the whole.
Cost: the parts' sums read once, and the scores of the exact tokens once for every `CHANNELS` channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import gpu_group_products as products
from compress.kernels.gpu import hopper, precision, triton
from compress.kernels.gpu_group_products import power
from compress.kernels.layout import outer_stride

CHANNELS, TOKENS, TOGETHER = 32, 32, 16  # of a program: channels of values, exact tokens and parts at a time
LEAST = 16  # queries of a matrix product
WARPS = 4

if triton:
    import triton.language as tl

    @triton.jit
    def group_finish(
        query, keys, values, sums, totals, tops, out, scaling, Q, E, new, shift, parts, outer, keys_outer, keys_row,
        values_outer, values_row,
        QUERIES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
        TOKENS: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """out[o, q] = softmax(scaling query[o, q] keys[o]^T, and the parts' scores) (values[o], and the parts').

        Of the last `new` of the E tokens a query sees those up to its own, which is number (shift + q) modulo `new`."""
        o = tl.program_id(0).to(tl.int64)
        c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        q, k, p, t = tl.arange(0, QUERIES), tl.arange(0, PADDED), tl.arange(0, TOGETHER), tl.arange(0, TOKENS)
        asked, inside, mine = q < Q, k < WIDTH, c < VALUE_WIDTH
        at = query + (o * Q + q[:, None]) * WIDTH + k[None, :]
        x = tl.load(at, mask=asked[:, None] & inside[None, :], other=0).to(tl.float32) * scaling
        highest, total = tl.full((QUERIES,), -3e38, tl.float32), tl.zeros((QUERIES,), tl.float32)
        found = tl.zeros((QUERIES, CHANNELS), tl.float32)
        for first in range(0, parts, TOGETHER):
            used = (first + p < parts)[:, None] & asked[None, :]
            to = ((first + p)[:, None] * outer + o) * Q + q[None, :]
            top = tl.load(tops + to, mask=used, other=-3e38)
            now = tl.maximum(highest, tl.max(top, 0))
            factor = tl.where(used, tl.exp(top - now[None, :]), 0)
            before = tl.exp(highest - now)
            total = total * before + tl.sum(factor * tl.load(totals + to, mask=used, other=0), 0)
            part = tl.load(
                sums + to[:, :, None] * VALUE_WIDTH + c[None, None, :], mask=used[:, :, None] & mine[None, None, :], other=0
            )
            found = found * before[:, None] + tl.sum(factor[:, :, None] * part, 0)
            highest = now
        own = (q + shift) % new + E - new
        for first in range(0, E, TOKENS):
            e = first + t
            here = e < E
            from_key = keys + o * keys_outer + e[None, :] * keys_row + k[:, None]
            key = tl.load(from_key, mask=here[None, :] & inside[:, None], other=0).to(tl.float32)
            seen = here[None, :] & (e[None, :] <= own[:, None])
            score = tl.where(seen, tl.dot(x, key, input_precision=PRECISION), -3e38)
            now = tl.maximum(highest, tl.max(score, 1))
            weight = tl.where(seen, tl.exp(score - now[:, None]), 0)
            before = tl.exp(highest - now)
            from_value = values + o * values_outer + e[:, None] * values_row + c[None, :]
            value = tl.load(from_value, mask=here[:, None] & mine[None, :], other=0).to(tl.float32)
            total = total * before + tl.sum(weight, 1)
            found = tl.dot(weight, value, found * before[:, None], input_precision=PRECISION)
            highest = now
        to = out + (o * Q + q[:, None]) * VALUE_WIDTH + c[None, :]
        tl.store(to, (found / total[:, None]).to(out.dtype.element_ty), mask=asked[:, None] & mine[None, :])


def attention(
    query: Tensor, exact: tuple[Tensor, Tensor], keys: tuple[Any, ...], values: tuple[Any, ...], new: int, scaling: float
) -> Tensor:
    """`[batch, heads, queries, value width]` in the dtype of the queries."""
    most, shift, found = products.most_queries(hopper()), 0, []
    for part in query.split(most, dim=2):
        part = part.contiguous()
        stored = products.sums(products.scores(part, scaling, *keys), query.dtype, *values)
        found.append(_finished(part, *exact, stored, new, shift, scaling))
        shift += most
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _finished(
    query: Tensor, exact_keys: Tensor, exact_values: Tensor, stored: tuple[Tensor, ...], new: int, shift: int, scaling: float
) -> Tensor:
    batch, heads, queries, width = query.shape
    value_width = exact_values.shape[3]
    out = query.new_empty(batch, heads, queries, value_width)
    channels = min(CHANNELS, power(value_width, 16))
    group_finish[(batch * heads, triton.cdiv(value_width, channels))](
        query, exact_keys, exact_values, *stored, out, scaling, queries, exact_keys.shape[2], new, shift, len(stored[0]),
        batch * heads, *(stride for x in (exact_keys, exact_values) for stride in (outer_stride(x), x.stride(2))),
        **constants(queries, width, value_width), CHANNELS=channels, PRECISION=precision(), num_warps=WARPS,
    )  # fmt: skip
    return out


def constants(queries: int, width: int, value_width: int) -> dict[str, int]:
    """Those that the shapes decide."""
    sizes = {"WIDTH": width, "PADDED": power(width, 16), "VALUE_WIDTH": value_width}
    return {"QUERIES": power(queries, LEAST), "TOKENS": TOKENS, "TOGETHER": TOGETHER} | sizes
