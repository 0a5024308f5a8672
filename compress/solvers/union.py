"""Unit vectors and a few learned atoms side by side: W ~= S + D C, with one budget of nonzeros over both.

Sources: sparse plus low rank (OATS, arXiv:2409.13652; HASSLE-free, arXiv:2502.00899), hard-thresholding pursuit.

A pruned weight leaves an error that has a structure of its own wherever many neurons miss the same direction of the inputs;
a learned atom serves all of them for one column of storage. Alternately, D is fitted to what the unit vectors leave (first
its leading directions, then least squares on the codes), and the codes are pursued over [I | D] together. The learned codes
are as sparse as they want to be: a few dense low-rank atoms are the special case in which every neuron uses every atom.
Cost: `rounds` pursuits over I + K atoms, and one I^3 eigendecomposition.

Legend: I input features, N output neurons, K learned atoms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.linalg import leading_directions
from compress.solvers import pursuit
from compress.solvers.orthogonal import refit_dictionary


def union_moments(gram_II: Tensor, target_NI: Tensor, dictionary_IK: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix and cross moments of [I | D], where `target_NI` is the weight to be coded: see `pursuit.solve`."""
    image_IK = gram_II @ dictionary_IK
    top = torch.cat([gram_II, image_IK], dim=1)
    bottom = torch.cat([image_IK.T, dictionary_IK.T @ image_IK], dim=1)
    return torch.cat([top, bottom]), torch.cat([target_NI @ gram_II, target_NI @ image_IK], dim=1)


def solve(
    weight_NI: Tensor,
    gram_II: Tensor,
    whitening: tuple[Tensor, Tensor],
    pruned_NI: Tensor,
    num_learned: int,
    nonzeros: int,
    *,
    rounds: int = 2,
    thresholds: int = 3,
    importance_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Learned atoms `[I, K]` of unit norm, and codes `[N, I + K]` to start a pursuit over [I | D] from.

    Args:
        weight_NI: fp64.
        gram_II: second moment of the inputs, fp64, positive definite.
        whitening: `(L, L_inv)` of it.
        pruned_NI: the weight as unit vectors alone would have it, with room left for a learned code of every atom.
        num_learned: K.
        nonzeros: of a neuron over both kinds of atoms.
        rounds: how often the learned atoms are fitted.
        thresholds: of each pursuit.
        importance_N: what an error in each neuron counts when the learned atoms are fitted; None: alike.
    """
    whiten, unwhiten = whitening
    inputs = len(gram_II)
    effort = {"thresholds": thresholds, "steps": 8}
    root_N = weight_NI.new_ones(len(weight_NI)) if importance_N is None else importance_N.sqrt()
    rest_IN = whiten @ (weight_NI - pruned_NI).T
    directions = leading_directions(rest_IN * root_N, num_learned)
    codes = torch.cat([pruned_NI, rest_IN.T @ directions], dim=1)
    for attempt in range(rounds):
        if attempt:
            rest_IN = whiten @ (weight_NI - codes[:, :inputs]).T
            directions, learned = refit_dictionary(rest_IN * root_N, codes[:, inputs:] * root_N[:, None])
            codes = torch.cat([codes[:, :inputs], learned / root_N[:, None]], dim=1)
        dictionary = unwhiten @ directions
        norm = dictionary.norm(dim=0).clamp_min(torch.finfo(dictionary.dtype).tiny)
        dictionary = dictionary / norm
        codes = torch.cat([codes[:, :inputs], codes[:, inputs:] * norm], dim=1)
        if attempt + 1 < rounds:
            moments = union_moments(gram_II, weight_NI, dictionary)
            codes, _ = pursuit.solve(*moments, codes, nonzeros, **effort)
    return dictionary, codes
