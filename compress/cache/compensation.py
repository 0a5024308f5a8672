"""The maths of SQuat: keys rounded block of channels by block of channels, each error kept away from the queries. The
matrices are found here and used by `compress.kernels.group_packing`.

Paper: SQuat, arXiv:2503.24358. A key is only ever read as q . k, so of its rounding error e only e^T A e matters, where A
is the second moment of the queries that will read it. With A = I + strength C d / tr C, channels are rounded in blocks;
the error of block t moves the channels f behind it, which are not rounded yet, to where e^T A e is smallest:

    x_f += G_t e_t        G_t = -A_ff^{-1} A_ft

This is GPTQ with the queries' moment as the Hessian. strength 0 makes every G_t zero: plain rounding (KIVI).

Where we differ from the released code: one Cholesky solve per block instead of an SVD, an explicit inverse and a Schur
recursion (the same numbers); the strength is relative to the mean diagonal of C, so it does not grow with the prompt;
channels are visited from the most to the least queried one, so that those that cannot be corrected any more matter least;
a cap on the entries of G keeps corrected channels in their range. The released form is a setting of this one: `rank`,
`natural_order`, and a strength from its own lambda.
Cost: d^3 / 3 per block once, then one [n, g] x [g, f] product per block and group of tokens.

Legend: H KV heads, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visiting_order(metric_HDD: Tensor, *, natural: bool = False) -> Tensor:
    """Channels `[..., D]` from the largest to the smallest diagonal entry of the metric, or as they come."""
    diagonal = metric_HDD.diagonal(dim1=-2, dim2=-1)
    if natural:
        return torch.arange(diagonal.shape[-1], device=diagonal.device).expand(diagonal.shape)
    return diagonal.argsort(dim=-1, descending=True, stable=True)


def leading(metric_HDD: Tensor, rank: int) -> Tensor:
    """The part of a metric in its `rank` largest eigenvectors, fp64."""
    values, vectors = torch.linalg.eigh(metric_HDD.double())
    kept = vectors[..., -rank:]
    return kept * values[..., None, -rank:] @ kept.mT


def corrections(metric_HDD: Tensor, order: Tensor, block: int, cap: float = 1.0) -> list[Tensor]:
    """G_t of every block but the last, `[..., D - (t + 1) block, block]` fp32, for channels in `order`.

    Args:
        metric_HDD: what is added to the identity: the second moment of the queries times its strength.
        cap: largest absolute entry of a G_t; a matrix above it is scaled down as a whole.
    Raises:
        ValueError: the metric is not finite.
    """
    metric = metric_HDD.double()
    if not torch.isfinite(metric).all():
        raise ValueError("the second moment of the queries holds NaN or infinite values")
    width = metric.shape[-1]
    full = torch.eye(width, dtype=torch.float64, device=metric.device) + metric
    full = full.gather(-2, order[..., :, None].expand_as(full)).gather(-1, order[..., None, :].expand_as(full))
    result = []
    for start in range(0, width - block, block):
        now, after = slice(start, start + block), slice(start + block, width)
        moved = -torch.cholesky_solve(full[..., after, now], torch.linalg.cholesky(full[..., after, after]))
        largest = moved.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(cap)
        result.append((moved * (cap / largest)).float())
    return result
