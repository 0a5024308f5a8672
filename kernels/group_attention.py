"""Attention over the packed groups of a KV cache, without a copy of them in full precision: two products of a decode step.

    group_scores    q . k of every token        (q * scale) . code + q . (minimum + centre)
    group_sums      sum over tokens of w v      per channel, sum of (w * scale) code + sum of w * minimum
    attention       both, with the tokens that are not packed and the softmax

The layout is that of `compress.kernels.affine_groups`. Scales are folded into the query once per row of keys, and into the
weights once per token of values, so a code costs its unpacking and one multiplication per query; the queries that share a KV
head share the unpacking. What lies between the two, the softmax, is over one number per token.

The plain-torch form multiplies slices out; it is the reference and runs everywhere. On a CPU C++ kernels of the two products
read the codes once, on a GPU the Triton kernels of attention as a whole do (`compress.kernels.gpu_attention`).
Cost: b / 8 bytes read per element, against 4 written and 4 read again by multiplying out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.kernels import cpu, gpu, gpu_attention
from compress.kernels.affine_groups import expand_groups_reference, fits_cpu
from compress.kernels.layout import one_outer, tokens_of_row

_SLICE = 1024  # tokens of one pass of the reference


def attention(
    query: Tensor, exact: tuple[Tensor, Tensor], keys: tuple[Any, ...], values: tuple[Any, ...], new: int, scaling: float
) -> Tensor:
    """The output of attention, `[batch, heads, queries of a head, value width]` in the dtype of the queries.

    Args:
        query: `[batch, heads, queries of a head, channels]`; queries are the new tokens of one query head after the other.
        exact: keys and values `[batch, heads, tokens, width]` of tokens that are not packed, the `new` ones last, which see
            each other backwards alone.
        keys: what `group_scores` takes behind the query.
        values: what `group_sums` takes behind the weights.
    """
    if query.is_cuda and _fits_gpu(query, keys, exact[0]) and _fits_gpu(query, values, exact[1]):
        return gpu_attention.attention(query, exact, keys, values, new, scaling)
    return attention_reference(query, exact, keys, values, new, scaling, group_scores, group_sums)


def group_scores(
    query: Tensor,
    packed: Tensor,
    affine: Tensor,
    bits: int,
    runs: int,
    units: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """Products of queries with every token, `[batch, heads, queries, tokens]` fp32.

    Args:
        query: `[batch, heads, queries of a head, channels]`.
        packed, affine, bits, runs, units, centre: as in `expand_groups`.
    """
    if fits_cpu(packed, affine, query, runs) and query.shape[-1] % 8 == 0:
        scores = cpu.group_scores(query, packed, affine, bits, runs, units, centre)
        if scores is not None:
            return scores
    return group_scores_reference(query, packed, affine, bits, runs, units, centre)


def group_scores_reference(
    query: Tensor,
    packed: Tensor,
    affine: Tensor,
    bits: int,
    runs: int,
    units: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """The same in torch."""
    width = query.shape[-1]
    tokens = tokens_of_row(packed, bits, width)
    step = max(1, _SLICE // tokens)
    scores = [query.new_empty(*query.shape[:3], 0, dtype=torch.float32)]
    for first in range(0, packed.shape[2], step):
        part = slice(first, first + step)
        keys = _multiplied_out(packed[:, :, part], affine[:, :, part], bits, runs, tokens, width, units, centre)
        scores.append(query.float() @ keys.mT)
    return torch.cat(scores, dim=-1)


def group_sums(
    weights: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, width: int, units: Tensor | None = None
) -> Tensor:
    """The sum of all tokens, each times its weight, `[batch, heads, queries, width]` fp32.

    Args:
        weights: `[batch, heads, queries of a head, tokens]`.
        packed, affine: with one token to a row.
    """
    if fits_cpu(packed, affine, weights, runs) and width % 8 == 0:
        sums = cpu.group_sums(weights, packed, affine, bits, runs, width, units)
        if sums is not None:
            return sums
    return group_sums_reference(weights, packed, affine, bits, runs, width, units)


def group_sums_reference(
    weights: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, width: int, units: Tensor | None = None
) -> Tensor:
    """The same in torch."""
    sums = weights.new_zeros(*weights.shape[:3], width, dtype=torch.float32)
    for first in range(0, packed.shape[2], _SLICE):
        part = slice(first, first + _SLICE)
        values = _multiplied_out(packed[:, :, part], affine[:, :, part], bits, runs, 1, width, units, None)
        sums += weights[..., part].float() @ values
    return sums


def attention_reference(
    query: Tensor, exact: tuple[Tensor, Tensor], keys: tuple[Any, ...], values: tuple[Any, ...], new: int, scaling: float,
    scores: Callable[..., Tensor] = group_scores_reference, sums: Callable[..., Tensor] = group_sums_reference,
) -> Tensor:  # fmt: skip
    """The same in torch, around two products."""
    scaled, (exact_keys, exact_values) = query.float() * scaling, exact
    near = scaled @ exact_keys.float().mT
    if new > 1:
        later = torch.ones(new, new, dtype=torch.bool, device=query.device).triu(1)
        near.unflatten(2, (-1, new))[..., -new:].masked_fill_(later, -torch.inf)
    weights = torch.cat([near, scores(scaled, *keys)], dim=-1).softmax(dim=-1)
    near, packed = weights.split([near.shape[-1], weights.shape[-1] - near.shape[-1]], dim=-1)
    return (near @ exact_values.float() + sums(packed, *values)).to(query.dtype)


def in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention had better run on packed bytes than on states multiplied out."""
    return dtype != torch.float64 and (device.type == "cpu" or (device.type == "cuda" and gpu.triton is not None))


def _fits_gpu(query: Tensor, stored: tuple[Any, ...], exact: Tensor) -> bool:
    whole = all(map(one_outer, (*stored[:2], exact)))
    return whole and exact.shape[-1] % 8 == 0 and gpu.usable(query) and exact.dtype != torch.float64


def _multiplied_out(
    packed: Tensor,
    affine: Tensor,
    bits: int,
    runs: int,
    tokens: int,
    width: int,
    units: Tensor | None,
    centre: Tensor | None,
) -> Tensor:
    """Some rows in fp32, `[batch, heads, rows * tokens, width]`."""
    out = torch.empty(*packed.shape[:2], packed.shape[2] * tokens, width, dtype=torch.float32, device=packed.device)
    expand_groups_reference(packed, affine, bits, runs, out, units, centre)
    return out
