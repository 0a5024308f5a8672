"""OMP + K-SVD with power iterations: the solver of the CoSpaDi paper, for reference.

Paper: CoSpaDi, arXiv:2509.22075, section 3.3 and appendix A.3; K-SVD: Aharon, Elad, Bruckstein 2006.

1. D = K columns of Y drawn at random, normalised; S = 0.
2. Orthogonal matching pursuit: each column of Y greedily takes s atoms; its coefficients are the least-squares ones.
3. K-SVD sweep: atom by atom, the rank-1 fit of what the other atoms leave in the columns that use it, by power
   iterations started at the current atom.
4. Repeat 2 and 3. The published setting is 60 rounds and 8 power iterations.

Where we differ: zero columns are not drawn, and when K is larger than what there is to draw the missing start atoms are
random normal vectors (the paper does not say); atoms that no column uses are left alone, as in the paper. OMP keeps D^T q
for its orthonormalised atoms q, which costs one product with D^T D per step instead of a growing Cholesky factor per
column; same atoms, same coefficients.
Cost per round: N K s^2 / 2 multiplications for OMP, all of them memory-bound; 2 I N s (2 P + 2) for the sweep in K
dependent steps. That dependence is why it is slow.

Legend: I input features, N output neurons, K atoms, B columns of one OMP batch, s nonzeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.solvers import SparseFactors, zero_factors


def omp(dictionary_IK: Tensor, target_IN: Tensor, num_nonzeros: int, *, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit with exactly `num_nonzeros` atoms per column; returns `(codes_NK, mask_NK)`.

    Atoms must have unit norm. `batch` columns are coded together and bound the memory: batch x s x K values.
    """
    gram_KK = dictionary_IK.T @ dictionary_IK
    codes, masks = [], []
    for target_IB in target_IN.split(batch, dim=1):
        cross_BK = target_IB.T @ dictionary_IK
        chosen_Bs = _greedy_support(gram_KK, cross_BK, num_nonzeros)
        sub_gram = gram_KK[chosen_Bs[:, :, None], chosen_Bs[:, None, :]].double()
        sub_gram.diagonal(dim1=1, dim2=2).add_(1e-10)  # atoms have unit norm: this is relative
        right = cross_BK.gather(1, chosen_Bs).double()[:, :, None]
        values = torch.linalg.solve(sub_gram, right).squeeze(2).to(target_IN.dtype)
        codes.append(torch.zeros_like(cross_BK).scatter_(1, chosen_Bs, values))
        masks.append(torch.zeros_like(cross_BK, dtype=torch.bool).scatter_(1, chosen_Bs, True))
    return torch.cat(codes), torch.cat(masks)


def _greedy_support(gram_KK: Tensor, cross_BK: Tensor, num_nonzeros: int) -> Tensor:
    """Indices `[B, s]` in the order OMP takes them: largest correlation with the residual, then project it out."""
    batch, atoms = cross_BK.shape
    correlation = cross_BK.clone()  # D^T r
    projected = cross_BK.new_zeros(batch, num_nonzeros, atoms)  # D^T q_t for the orthonormalised atoms q_t
    chosen = torch.zeros(batch, num_nonzeros, dtype=torch.long, device=cross_BK.device)
    taken = torch.zeros_like(cross_BK, dtype=torch.bool)
    for t in range(num_nonzeros):
        index = correlation.abs().masked_fill(taken, -1).argmax(dim=1, keepdim=True)
        chosen[:, t : t + 1] = index
        taken.scatter_(1, index, True)
        image = gram_KK[index.squeeze(1)]  # D^T d
        if t:
            overlap = projected[:, :t].gather(2, index[:, None, :].expand(-1, t, 1))  # q_j . d, [B, t, 1]
            image = image - (overlap.transpose(1, 2) @ projected[:, :t]).squeeze(1)
        norm = image.gather(1, index).clamp_min(1e-12).sqrt()  # length of d orthogonal to the q_j
        image = image / norm
        projected[:, t] = image
        correlation = correlation - (correlation.gather(1, index) / norm) * image
    return chosen


def ksvd_sweep(
    target_IN: Tensor, dictionary_IK: Tensor, codes_NK: Tensor, mask_NK: Tensor, power_iterations: int
) -> tuple[Tensor, Tensor]:
    """Update every atom and its coefficients once, in order; supports are kept. Returns new `(D, S)`."""
    dictionary, codes = dictionary_IK.clone(), codes_NK.clone()
    residual_IN = target_IN - dictionary @ codes.T
    for atom in range(dictionary.shape[1]):
        users = mask_NK[:, atom].nonzero().squeeze(1)
        if len(users) == 0:
            continue
        d, s = dictionary[:, atom], codes[users, atom]
        part = residual_IN[:, users] + d[:, None] * s
        for _ in range(power_iterations):
            s = part.T @ d
            image = part @ s
            d = image / image.norm().clamp_min(torch.finfo(d.dtype).tiny)
        s = part.T @ d
        dictionary[:, atom], codes[users, atom] = d, s
        residual_IN[:, users] = part - d[:, None] * s
    return dictionary, codes


def solve(
    target_IN: Tensor,
    num_atoms: int,
    num_nonzeros: int,
    *,
    iterations: int = 60,
    power_iterations: int = 8,
    seed: int = 42,
) -> SparseFactors:
    """Factorize `target_IN` as the paper does; arguments as in `orthogonal.solve`, K may exceed I.

    Raises:
        ValueError: more nonzeros than atoms or than input features.
    """
    rows, columns = target_IN.shape
    if not num_nonzeros <= min(num_atoms, rows):
        raise ValueError(f"expected nonzeros <= min({num_atoms} atoms, {rows} input features), got {num_nonzeros}")
    if not target_IN.any():
        return zero_factors(target_IN, num_atoms, num_nonzeros)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
    order = torch.randperm(columns, generator=generator).to(target_IN.device)
    largest = target_IN.abs().amax(dim=0)
    alive = largest > torch.finfo(target_IN.dtype).eps * largest.max()  # an atom that starts at zero stays there
    start = target_IN[:, order[alive[order]][:num_atoms]]
    if num_atoms > start.shape[1]:
        extra = torch.randn(rows, num_atoms - start.shape[1], generator=generator)
        start = torch.cat([start, extra.to(target_IN)], dim=1)
    dictionary = start / start.norm(dim=0).clamp_min(torch.finfo(start.dtype).tiny)
    for _ in range(iterations):
        codes, mask = omp(dictionary, target_IN, num_nonzeros)
        dictionary, codes = ksvd_sweep(target_IN, dictionary, codes, mask, power_iterations)
    return SparseFactors(dictionary, codes, mask)
