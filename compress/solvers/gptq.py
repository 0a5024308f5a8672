"""GPTQ: round a weight column by column and let the columns that follow take up each column's error.

Paper: GPTQ, arXiv:2210.17323 (after Optimal Brain Surgeon); the closed form by Cholesky is the paper's section 3.3.

Minimises ||X (W - What)||^2 = sum over rows of e G e^T, G = X^T X. With U the upper Cholesky factor of (G + damping)^{-1}:
column i, in order, is rounded to its grid; its error divided by U_ii, times row i of U, is subtracted from the columns
still to come. Errors of `block` columns are gathered before they reach the columns behind the block, so nearly all work
is matrix products.

Where we differ: the order is by falling diagonal of G *within* the precision parts, always low before high, with scales
that belong to the stored group whatever the order ("static groups": scales are searched on the original weights); the
code range and the scale search are `compress.quantizer`'s, weighted by diag(G). Afterwards `sweeps` passes of coordinate
descent may move any code to the neighbour that lowers the whole error, and `refit` solves each row's scales by least
squares for the codes found.
Cost: I^3 for the factorizations, N I^2 for the loop, N I^2 per sweep.

Legend: N rows (output neurons), I columns (input features), G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.column_rounding import round_columns
from compress.quantizer import Group, by_group, runs_of, search_scales, stored_scale

_SCALES_AT_ONCE = 1 << 25  # entries of the normal matrices of a refit


def solve(
    weight_NI: Tensor,
    gram_II: Tensor,
    groups: list[Group],
    *,
    damping: float = 0.01,
    block: int = 128,
    activation_order: bool = True,
    sweeps: int = 0,
    refits: int = 0,
    steps: int = 24,
    power: float = 2.0,
    mask_NI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes `[N, I]` int8 and scales `[N, G]` (fp32, exact in the storage dtype).

    Args:
        weight_NI: fp32.
        gram_II: second moment of the inputs, fp64.
        groups: cover all columns in order; columns of fewer bits are rounded first.
        damping: added to the Gram matrix, relative to its mean diagonal.
        activation_order: round columns with large inputs first, within their precision.
        sweeps: passes of coordinate descent after the loop.
        refits: how often the scales are refitted, each followed by the sweeps again.
        steps, power: of the scale search, see `compress.quantizer.search_scale`.
        mask_NI: where codes may differ from zero; the weight must be zero elsewhere, best fitted to the mask.
    Raises:
        ValueError: the Gram matrix is not finite, or zero.
    """
    diagonal = gram_II.diagonal()
    if not torch.isfinite(gram_II).all():
        raise ValueError("the Gram matrix holds NaN or infinite values")
    if diagonal.mean() <= 0:
        raise ValueError("the Gram matrix is zero: the layer never saw a non-zero input")
    damped = gram_II + damping * diagonal.mean() * torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    importance = damped.diagonal().float()
    scales = search_scales(weight_NI, groups, steps=steps, power=power, importance_I=importance)
    order = _order(groups, diagonal, activation_order)
    codes = _round_in_order(weight_NI, damped, groups, scales, order, block, mask_NI)
    for attempt in range(refits + 1):
        if attempt:
            scales = _refit_scales(weight_NI, damped, codes, scales, groups)
        for _ in range(sweeps):
            codes = _coordinate_descent(weight_NI, damped, codes, scales, groups, block, mask_NI)
    return codes.to(torch.int8), scales


def _order(groups: list[Group], diagonal: Tensor, by_activation: bool) -> Tensor:
    """Column order: precision first (low before high), then falling input energy or as stored."""
    bits = torch.cat([torch.full((g.stop - g.start,), g.bits) for g in groups]).to(diagonal.device)
    if not by_activation:
        return bits.argsort(stable=True)
    falling = diagonal.argsort(descending=True, stable=True)
    return falling[bits[falling].argsort(stable=True)]


def _per_column(groups: list[Group], scales_NG: Tensor) -> tuple[Tensor, Tensor]:
    """The scale `[I, N]` and the half range 2^(bits-1) `[I]` of every column."""
    widths = torch.tensor([g.stop - g.start for g in groups], device=scales_NG.device)
    half = torch.tensor([1 << (g.bits - 1) for g in groups], dtype=torch.int32, device=scales_NG.device)
    return scales_NG.T.repeat_interleave(widths, dim=0), half.repeat_interleave(widths)


def _round_in_order(
    weight_NI: Tensor,
    damped_II: Tensor,
    groups: list[Group],
    scales_NG: Tensor,
    order: Tensor,
    block: int,
    mask_NI: Tensor | None,
) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped_II[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()  # the one cast: the loop runs in fp32
    rest_IN = weight_NI.T[order].contiguous()  # columns as rows: each step reads contiguous memory
    column_scale, column_half = _per_column(groups, scales_NG)
    column_scale, half = column_scale[order], column_half[order]
    inverse_scale = torch.where(column_scale == 0, 0, 1 / column_scale)
    if mask_NI is not None:
        inverse_scale *= mask_NI.T[order]  # zero outside the mask: what the loop put there is an error like any other
    codes_IN = torch.empty_like(rest_IN)
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        part = slice(start, stop)
        codes_IN[part], errors = round_columns(
            rest_IN[part], upper[part, part], column_scale[part], inverse_scale[part], half[part]
        )
        rest_IN[stop:].addmm_(upper[part, stop:].T, errors, alpha=-1)
    codes = torch.empty_like(codes_IN)
    codes[order] = codes_IN
    return codes.T.contiguous()


def _coordinate_descent(
    weight_NI: Tensor,
    damped_II: Tensor,
    codes_NI: Tensor,
    scales_NG: Tensor,
    groups: list[Group],
    block: int,
    mask_NI: Tensor | None,
) -> Tensor:
    """One cyclic pass: every code becomes the best one for all others as they are. The error never rises."""
    gram = damped_II.float()
    column_scale, half = _per_column(groups, scales_NG)
    inverse_scale = torch.where(column_scale == 0, 0, 1 / column_scale)
    if mask_NI is not None:
        inverse_scale *= mask_NI.T
    codes_IN = codes_NI.T.contiguous()
    error_IN = weight_NI.T - codes_IN * column_scale
    pull_IN = gram @ error_IN  # half the negative gradient
    for start in range(0, len(gram), block):
        stop = min(start + block, len(gram))
        part = slice(start, stop)
        codes_IN[part], moved = round_columns(
            pull_IN[part], gram[part, part].T, column_scale[part], inverse_scale[part], half[part], codes_IN[part]
        )
        pull_IN[stop:].addmm_(gram[stop:, part], moved, alpha=-1)
    return codes_IN.T.contiguous()


def _group_sums(x_NI: Tensor, groups: list[Group]) -> Tensor:
    """Sums `[N, G]` over the columns of every group."""
    return torch.cat([by_group(x_NI, run).sum(dim=-1) for run in runs_of(groups)], dim=1)


def _refit_scales(weight_NI: Tensor, damped_II: Tensor, codes_NI: Tensor, scales_NG: Tensor, groups: list[Group]) -> Tensor:
    """Least-squares scales of every row for fixed codes: a G x G system per row, fp64, damped towards the old scales."""
    gram = damped_II.double()
    codes = codes_NI.double()
    most = max(1, _SCALES_AT_ONCE // len(groups) ** 2)
    if len(codes) > most:  # rows are independent: at 8B and small groups all at once would take gigabytes
        parts = zip(*(tensor.split(most) for tensor in (weight_NI, codes_NI, scales_NG)), strict=True)
        return torch.cat([_refit_scales(weight, damped_II, code, scale, groups) for weight, code, scale in parts])
    image = weight_NI.double() @ gram
    right = _group_sums(codes * image, groups)
    spreads = (codes[:, g.start : g.stop] @ gram[g.start : g.stop] for g in groups)  # [N, I] each
    normal = torch.stack([_group_sums(spread * codes, groups) for spread in spreads], dim=1)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None] + torch.finfo(torch.float64).tiny
    normal.diagonal(dim1=1, dim2=2).add_(ridge)
    fitted = torch.linalg.solve(normal, right + ridge * scales_NG.double())
    return stored_scale(fitted)
