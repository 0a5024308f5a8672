"""Attention over the packed groups of a KV cache, without a copy of them in full precision: two products of a decode step.

    group_scores    q . k of every token        (q * scale) . code + q . (minimum + centre)
    group_sums      sum over tokens of w v      per channel, sum of (w * scale) code + sum of w * minimum

The layout is that of `compress.kernels.affine_groups`. Scales are folded into the query once per row of keys, and into the
weights once per token of values, so a code costs its unpacking and one multiplication per query; the queries that share a KV
head share the unpacking. What lies between the two, the softmax, is over one number per token.

The plain-torch form multiplies slices out; it is the reference and runs everywhere. On a CPU the C++ kernel, on a GPU the
Triton kernel (`compress.kernels.gpu_attention`) reads the codes once.
Cost: b / 8 bytes read per element, against 4 written and 4 read again by multiplying out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels import cpu, gpu, gpu_attention
from compress.kernels.affine_groups import expand_groups_reference, fits_cpu
from compress.kernels.layout import one_outer, tokens_of_row

_SLICE = 1024  # tokens of one pass of the reference


def group_scores(
    query: Tensor,
    packed: Tensor,
    affine: Tensor,
    bits: int,
    runs: int,
    units: Tensor | None = None,
    centre: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Products of queries with every token, `[batch, heads, queries, tokens]` fp32.

    Args:
        query: `[batch, heads, queries of a head, channels]`.
        packed, affine, bits, runs, units, centre: as in `expand_groups`.
        out: where to write them, and what is returned then; its rows may be parts of longer ones.
    """
    width = query.shape[-1]
    if query.is_cuda and _fits_gpu(packed, affine, query, width):
        if out is None:
            tokens = packed.shape[2] * tokens_of_row(packed, bits, width)
            out = query.new_empty(*query.shape[:3], tokens, dtype=torch.float32)
        gpu_attention.write_scores(query, packed, affine, bits, runs, units, centre, out)
        return out
    scores = None
    if fits_cpu(packed, affine, query, runs) and width % 8 == 0:
        scores = cpu.group_scores(query, packed, affine, bits, runs, units, centre)
    if scores is None:
        scores = group_scores_reference(query, packed, affine, bits, runs, units, centre)
    return scores if out is None else out.copy_(scores)


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
    if weights.is_cuda and _fits_gpu(packed, affine, weights, width):
        return gpu_attention.sums(weights, packed, affine, bits, runs, width, units)
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


def in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention had better run on packed bytes than on states multiplied out."""
    return dtype != torch.float64 and (device.type == "cpu" or (device.type == "cuda" and gpu.triton is not None))


def _fits_gpu(packed: Tensor, affine: Tensor, states: Tensor, width: int) -> bool:
    return width % 8 == 0 and gpu.usable(states) and one_outer(packed) and one_outer(affine)


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
