"""Sparse codes for a dictionary that is given, on Gram matrices alone: which atoms each neuron uses, and how much of each.

Sources: hard-thresholding pursuit (Foucart 2011), preconditioned conjugate gradient on a support (ALPS, arXiv:2406.07831).

minimise ||X (W - A S)||^2 over S with s entries per row. H = A^T G A and C = W G A say all there is to know of X, W and A,
so one solver serves unit vectors (pruning: A = I), learned atoms, and both side by side.

1. Every atom is scaled to unit norm, H to a unit diagonal: a code is then worth its square, whatever its atom's size.
2. The support: the s largest codes of the start, then thresholding steps, in which entries outside compete by what each
   alone would still gain. The best support met is kept, so a step never hurts. Unit vectors have a better start than the
   weight itself: `compress.solvers.elimination`.
3. The codes on the support by conjugate gradient to convergence, in fp64.

ADMM in search of the support, as published for pruning, ended no better than three thresholding steps (docs/log.md).
Cost: 2 N K^2 flops per step of any kind.

Legend: N rows (output neurons), K atoms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.linalg import largest_per_row

_SHORT = 8  # conjugate-gradient steps between two thresholding steps
_TOLERANCE = 1e-7  # of the final refit: a thousandth of the error of what is hardly compressed


def select(score_NK: Tensor, nonzeros: int, balance: int = 0) -> Tensor:
    """Boolean mask of the `nonzeros` largest scores of every row; with `balance` M, equally many of every M in a row."""
    if not balance:
        return largest_per_row(score_NK, nonzeros)
    groups = score_NK.unflatten(1, (-1, balance))
    return largest_per_row(groups.flatten(0, 1), nonzeros // groups.shape[1]).view_as(score_NK)


def refit_codes(
    gram_KK: Tensor, cross_NK: Tensor, codes_NK: Tensor, mask_NK: Tensor, steps: int, tolerance: float = 0.0
) -> Tensor:
    """Minimise ||Y - D S||_F over S on a fixed support: Jacobi-preconditioned conjugate gradient, all rows at once.

    Args:
        gram_KK: D^T D.
        cross_NK: (D^T Y)^T.
        codes_NK: start, zero outside the mask.
        mask_NK: the support.
        steps: conjugate-gradient steps at most, one K x K x N product each.
        tolerance: end when a step gains less than this part of the energy of D S.
    """
    limits, diagonal = torch.finfo(gram_KK.dtype), gram_KK.diagonal()
    inverse_diagonal = 1 / diagonal.clamp_min(limits.tiny)
    residual = (cross_NK - codes_NK @ gram_KK) * mask_NK
    direction = residual * inverse_diagonal
    energy = (residual * direction).sum(dim=1, keepdim=True)
    codes = codes_NK
    for _ in range(steps):
        image = (direction @ gram_KK) * mask_NK
        curvature = (direction * image).sum(dim=1, keepdim=True)
        # a row that has converged has no energy and no curvature left: it stays where it is; so does one whose curvature
        # is no more than rounding, along which a step would lead anywhere
        rounding = limits.eps * (direction.square() * diagonal).sum(dim=1, keepdim=True)
        step = torch.where(curvature > rounding, energy / curvature, 0)
        codes = codes + step * direction
        if tolerance and (step * energy).sum() < tolerance * (codes * cross_NK).sum():
            break
        residual = residual - step * image
        preconditioned = residual * inverse_diagonal
        new_energy = (residual * preconditioned).sum(dim=1, keepdim=True)
        direction = preconditioned + torch.where(energy > 0, new_energy / energy, 0) * direction
        energy = new_energy
    return codes


def solve(
    gram_KK: Tensor,
    cross_NK: Tensor,
    start_NK: Tensor,
    nonzeros: int,
    *,
    balance: int = 0,
    thresholds: int = 3,
    steps: int = 40,
) -> tuple[Tensor, Tensor]:
    """Codes `[N, K]` and their mask; the codes are zero outside it.

    Args:
        gram_KK: H = A^T G A, symmetric positive definite, fp64.
        cross_NK: W G A, fp64.
        start_NK: codes without regard to sparsity; for pruning, the weight itself.
        nonzeros: entries in every row of the mask.
        balance: see `select`.
        thresholds: thresholding steps, each followed by a short refit.
        steps: conjugate-gradient steps of the final refit at most.
    """
    norm = gram_KK.diagonal().clamp_min(torch.finfo(gram_KK.dtype).tiny).sqrt()
    unit_gram, unit_cross = gram_KK / norm / norm[:, None], cross_NK / norm
    codes = start_NK * norm
    if nonzeros < codes.shape[1]:
        # supports are sought in fp32, where products are twice as fast; the codes that are kept are fitted in fp64
        codes, mask = _pursued(unit_gram.float(), unit_cross.float(), codes.float(), nonzeros, balance, thresholds)
    else:
        mask = torch.ones_like(codes, dtype=torch.bool)
    codes = refit_codes(unit_gram, unit_cross, codes.double(), mask, steps, _TOLERANCE)
    return codes / norm, mask


def _pursued(
    gram: Tensor, cross: Tensor, codes: Tensor, nonzeros: int, balance: int, thresholds: int
) -> tuple[Tensor, Tensor]:
    """Codes and mask of the best round of hard thresholding."""
    mask = select(codes.abs(), nonzeros, balance)
    if not thresholds:
        return codes * mask, mask
    least, best = None, None
    for attempt in range(thresholds + 1):
        if attempt:
            # an entry inside is at, or within a few steps of, its optimum: only those outside show their gradient
            gradient = cross - codes @ gram
            mask = select(torch.where(mask, codes, gradient).abs(), nonzeros, balance)
        codes = refit_codes(gram, cross, codes * mask, mask, _SHORT)
        error = float((codes * (codes @ gram - 2 * cross)).double().sum())  # up to a constant
        if least is None or error < least:
            least, best = error, (codes, mask)
    return best
