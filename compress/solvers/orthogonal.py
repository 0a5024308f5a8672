"""Orthonormal dictionary first, then freed: the default solver of Y ~= D S with column-sparse S.

Sources: orthonormal sparse coding (Lesage et al. 2005; COMPOT, arXiv:2602.15200), least-squares dictionary updates
(MOD, Engan et al. 1999), hard-thresholding pursuit (Foucart 2011).

1. D = the leading K left singular vectors of Y.
2. Orthonormal stage. For D^T D = I the best S with s entries per column is exactly the s largest of D^T Y, and the best
   orthonormal D for given S is the polar factor of Y S^T. Both steps are exact, so the error never rises.
3. Free stage. Drop orthonormality: D by least squares on the fixed S, one hard-thresholding step to let atoms trade
   places in the support, S by conjugate gradient restricted to the support. The best factors of the last rounds
   and of the orthonormal stage are returned, so this stage cannot end worse than it began.

Everything is a large matrix product or a K x K factorization, where K-SVD runs through K atoms one by one and OMP
through s entries one by one; at s ~ K/2, the regime of language models, that is two orders of magnitude in time.
Left out: atoms beyond the input width (K <= I is required).
Cost per step: 2 I N K flops, four times; plus K^2 N per conjugate-gradient step and one K x K eigendecomposition.

Legend: I input features, N output neurons, K atoms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.linalg import largest_per_row, leading_directions, polar
from compress.solvers import SparseFactors, zero_factors
from compress.solvers.pursuit import refit_codes


def refit_dictionary(target_IN: Tensor, codes_NK: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Least-squares dictionary for fixed codes, with unit atoms; returns `(D, S)`, the norms moved into S.

    The ridge, relative to the mean squared row norm of S, keeps an atom that nobody uses from dividing by zero.
    """
    normal = (codes_NK.T @ codes_NK).double()
    normal.diagonal().add_(ridge * normal.diagonal().mean() + torch.finfo(normal.dtype).tiny)
    right = (target_IN @ codes_NK).double()
    dictionary = torch.linalg.solve(normal, right.T).T.to(target_IN.dtype)
    norm = dictionary.norm(dim=0).clamp_min(torch.finfo(target_IN.dtype).tiny)
    return dictionary / norm, codes_NK * norm


def solve(
    target_IN: Tensor, num_atoms: int, num_nonzeros: int, *, iterations: int = 6, refits: int = 12, cg_steps: int = 3
) -> SparseFactors:
    """Factorize `target_IN` into an `[I, num_atoms]` dictionary and codes with `num_nonzeros` entries per column.

    Args:
        target_IN: Y = L W, any float dtype; the result has the same.
        iterations: rounds of the orthonormal stage.
        refits: rounds of the free stage; 0 returns the orthonormal dictionary.
        cg_steps: conjugate-gradient steps per round of the free stage.
    Raises:
        ValueError: more atoms than input features, or more nonzeros than atoms.
    """
    rows = target_IN.shape[0]
    if not num_nonzeros <= num_atoms <= rows:
        raise ValueError(f"expected nonzeros <= atoms <= {rows} input features, got {num_nonzeros} and {num_atoms}")
    if not target_IN.any():
        return zero_factors(target_IN, num_atoms, num_nonzeros)
    dictionary = leading_directions(target_IN, num_atoms)
    target_NI = target_IN.T.contiguous()

    for _ in range(iterations):
        codes = target_NI @ dictionary
        codes = codes * largest_per_row(codes.abs(), num_nonzeros)
        dictionary = polar(target_IN @ codes)
    codes = target_NI @ dictionary
    mask = largest_per_row(codes.abs(), num_nonzeros)
    best = SparseFactors(dictionary, codes * mask, mask)
    if refits == 0:
        return best

    codes, energy = best.codes_NK, target_IN.square().sum()
    best_error, settled = None, refits - max(1, refits // 4)  # the last quarter settles on a fixed support
    for step in range(refits):
        dictionary, codes = refit_dictionary(target_IN, codes)
        gram, cross = dictionary.T @ dictionary, target_NI @ dictionary
        if step < settled:
            # Atoms have unit norm, so the gradient is also what one atom alone would add to the code. Only atoms
            # outside the support are moved: those inside are at, or within a few CG steps of, their optimum.
            gradient = cross - codes @ gram
            mask = largest_per_row(torch.where(mask, codes, gradient).abs(), num_nonzeros)
            codes = codes * mask
        codes = refit_codes(gram, cross, codes, mask, cg_steps)
        if step < settled:
            continue
        # ||Y - D S||^2 from the small matrices, relative: ranks the rounds, is not reported
        error = float((energy - 2 * (codes * cross).sum() + (codes * (codes @ gram)).sum()) / energy)
        if best_error is None or error < best_error:
            best_error, freed = error, SparseFactors(dictionary, codes, mask)
    return min(best, freed, key=lambda factors: factors.relative_error(target_IN))
