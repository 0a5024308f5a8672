"""Which weights of a matrix to prune, and what the others become: optimal brain surgeon for all neurons at once.

Sources: OBS (Hassibi & Stork 1993); OBC (arXiv:2208.11580), which prunes one weight at a time and lets the others make up
for it.

minimise ||X (W - V)||^2 over V with s entries per row. With H = G^-1, pruning weight i costs w_i^2 / H_ii once the others
have made up for it, and a set D of pruned weights moves a row to

    v = w - u H_D:        u H_DD = w_D

OBC keeps an inverse per row and removes weights one by one: I^3 flops a row. Here D grows in a few rounds, for all rows at
once, and u follows by a few steps of conjugate gradient from where it was: products with one matrix H that all rows share.
Steps on u converge several times faster than steps on the weights themselves, because D is the smaller set and its part of
H the better conditioned one. Rounds shrink towards the end, where every weight counts. With 32 rounds the error is OBC's
in a fraction of its time; hard thresholding, which scores a weight by what it is worth alone, errs by 5 to 15 % more
(docs/log.md).

Cost: about 6 products N x I x I in fp32 per round. Legend: N output neurons, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.linalg import largest_per_row
from compress.solvers.pursuit import refit_codes

RIDGE = 1e-3  # of a unit diagonal, for the inverse: supports are sought in fp32, and codes are fitted without it
_STEPS = 8  # of conjugate gradient in a round, at most
_TOLERANCE, _LAST = 1e-2, 1e-3  # a step that gains less of the energy of u ends a round, and the last one


def prune(inverse: tuple[Tensor, Tensor], weight_NI: Tensor, nonzeros: int, *, balance: int = 0, rounds: int = 16) -> Tensor:
    """The weight `[N, I]`, fp64, with `nonzeros` entries left in every row, which have nearly made up for the others.

    Args:
        inverse: of `SecondMoment.unit_inverse(RIDGE)`.
        weight_NI: fp64.
        balance: M, where equally many of every M in a row are to stay; 0: any.
        rounds: in which weights are pruned.
    """
    norm, inverse_II = inverse
    price = 1 / inverse_II.diagonal()
    weight = (weight_NI * norm).float()
    inputs = weight.shape[1]
    codes, pruned = weight, torch.zeros_like(weight, dtype=torch.bool)
    forces = torch.zeros_like(weight)  # u
    for number in range(1, rounds + 1):
        count = round((inputs - nonzeros) * (1 - (1 - number / rounds) ** 2))
        if count:
            pruned = _cheapest(codes.square() * price, pruned, count, nonzeros, balance)
            forces = refit_codes(inverse_II, weight, forces, pruned, _STEPS, _TOLERANCE if number < rounds else _LAST)
            codes = weight - forces @ inverse_II
    return (codes * ~pruned).double() / norm


def _cheapest(cost_NI: Tensor, pruned_NI: Tensor, count: int, nonzeros: int, balance: int) -> Tensor:
    """Mask of `count` weights of every row: those that are pruned, and the cheapest of the others."""
    cost = torch.where(pruned_NI, -1.0, cost_NI)
    if balance:  # no more of a group than it must lose in the end
        lost = balance * (cost.shape[1] - nonzeros) // cost.shape[1]
        groups = cost.unflatten(1, (-1, balance)).flatten(0, 1)
        cost = torch.where(largest_per_row(-groups, lost).view_as(cost), cost, torch.inf)
    return largest_per_row(-cost, count)
