"""CoSpaDi: a weight as a dictionary times column-sparse codes, fitted to the layer's outputs.

Paper: CoSpaDi, arXiv:2509.22075.

minimise ||X (W - A S)||_F with s nonzeros in every column of S `[A, N]` (columns are output neurons). The atoms A are
    learned            D, as in the paper: with X^T X = L^T L, ordinary sparse dictionary learning of Y = L W, D = L^{-1} D_L
    identity           the unit vectors: W itself, pruned and refitted, with nothing spent on atoms
    identity+learned   both: D for what the pruned weight leaves
one storage and one layer for all (`compress.layers.sparse_dictionary`). Values are bf16 or integers; rounded ones are
fitted by GPTQ on their support, where the error of a code is taken up by the codes that follow.

Where we differ from the paper: the identity, which it does not try and which nearly always wins at equal bytes; the learned
dictionary is by default that of `compress.solvers.orthogonal` (`ksvd` is the paper's); whitening by eigh in fp64 with
relative damping; codes are refitted to the rounded atoms on the exact Gram matrix; bytes count the mask, which the paper
hides in 14-bit coefficients; inputs are on the dictionary side, as the theory needs (Table 10 has the sides swapped).
Left out: dictionaries that several matrices share. Cost: one I x I eigh or Cholesky, plus the solver.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.pack import pack_signed
from compress.layers import Spec
from compress.layers.sparse_dictionary import atom_groups, packed_codes
from compress.linalg import SecondMoment, power_of_two
from compress.methods import bf16
from compress.methods._dictionary_sizes import Config, alternatives, kinds, plan
from compress.quantizer import SCALE_DTYPE, dequantize, groups_of, quantize, search_scale
from compress.solvers import elimination, gptq, ksvd, orthogonal, pursuit, union

__all__ = ["Config", "alternatives", "compress", "flops", "kinds", "plan", "quick", "solves_neurons_alone"]

_LEAST_IMPORTANCE = 1e-3


def solves_neurons_alone(config: Config) -> bool:
    """Whether a neuron's codes are the same whichever others there are."""
    return config.dictionary == "identity"


def quick(config: Config) -> Config:
    """The same at less expense: enough to compare alternatives by."""
    steps = 4 if config.value_bits == 16 else 0  # GPTQ makes good what is left off
    # without one, learned atoms beside unit vectors err by an eighth more than they will, unit vectors alone by nothing
    thresholds = 1 if config.dictionary == "identity+learned" else 0
    least = {"iterations": 1, "refits": 2, "rounds": 4, "thresholds": thresholds, "refit_steps": steps, "polish": 0}
    return config.model_copy(update=least)


def compress(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> dict[str, Tensor]:
    """Packed tensors of the weight; see `compress.methods`."""
    weight = weight_NI.double()
    scale = power_of_two(weight)
    weight = weight / scale  # solvers square what they get: tiny weights would vanish
    gram = inputs.damped(config.damping)
    tensors: dict[str, Tensor] = {}
    mask = None
    if not spec["num_atoms"]:
        moments, codes = (gram, weight @ gram), _pruned(weight, inputs, spec, config)
    elif spec["unit_atoms"]:
        pruned, whitening = _pruned(weight, inputs, spec, config), inputs.whitening(config.damping)
        sizes = (spec["num_atoms"], spec["num_nonzeros"])
        dictionary, codes = union.solve(
            weight, gram, whitening, pruned, *sizes, thresholds=config.thresholds, importance_N=_importance(inputs, config)
        )
        stored, tensors = _rounded_dictionary(dictionary, spec["dictionary_bits"])
        moments = union.union_moments(gram, weight, stored)
    else:
        dictionary, codes, mask = _learned(weight, inputs, spec, config)
        stored, tensors = _rounded_dictionary(dictionary, spec["dictionary_bits"])
        image = gram @ stored
        moments = (stored.T @ image, weight @ image)
    if mask is None:
        decided = not spec["num_atoms"] and not spec["balance"] and 2 * spec["num_nonzeros"] >= weight.shape[1]
        effort = {"thresholds": 0 if decided else config.thresholds, "steps": config.refit_steps}
        codes, mask = pursuit.solve(*moments, codes, spec["num_nonzeros"], balance=spec["balance"], **effort)
    else:  # L^{-1} amplifies the rounding of atoms in weak directions: a refit takes that up
        codes = pursuit.refit_codes(*moments, codes, mask, config.refit_steps)
    if spec["value_bits"] == 16:
        return {**tensors, **packed_codes(spec, codes * scale, mask, None)}
    groups = atom_groups(spec)
    integers, scales = gptq.solve(
        codes.float(), moments[0], groups, sweeps=config.polish, refits=config.polish, mask_NI=mask
    )
    return {**tensors, **packed_codes(spec, integers, mask, scales * scale)}


def _pruned(weight: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> Tensor:
    """The weight with as many entries in every row as are left beside a code of each learned atom."""
    nonzeros = max(1, spec["num_nonzeros"] - spec["num_atoms"])
    if nonzeros >= weight.shape[1]:
        return weight
    inverse = inputs.unit_inverse(elimination.RIDGE)
    return elimination.prune(inverse, weight, nonzeros, balance=spec["balance"], rounds=config.rounds)


def _learned(weight: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms of unit norm, codes and mask of the paper's problem."""
    whiten, unwhiten = inputs.whitening(config.damping)
    importance = _importance(inputs, config)
    root = weight.new_ones(len(weight)) if importance is None else importance.sqrt()
    target_IN = whiten @ (weight * root[:, None]).T
    scale = power_of_two(target_IN)
    target_IN = (target_IN / scale).float()
    sizes = (spec["num_atoms"], spec["num_nonzeros"])
    if config.solver == "orthogonal":
        factors = orthogonal.solve(target_IN, *sizes, iterations=config.iterations, refits=config.refits)
    else:
        factors = ksvd.solve(
            target_IN,
            *sizes,
            iterations=config.iterations,
            power_iterations=config.power_iterations,
            seed=config.seed,
        )
    dictionary = unwhiten @ factors.dictionary_IK.double()
    norm = dictionary.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return dictionary / norm, factors.codes_NK.double() * (scale * norm) / root[:, None], factors.mask_NK


def _importance(inputs: SecondMoment, config: Config) -> Tensor | None:
    """What an error in each neuron counts, one in the mean; None when all count alike. None is neglected wholly."""
    if config.weighting == "none" or inputs.importance_N is None or not inputs.importance_N.any():
        return None
    relative = inputs.importance_N / inputs.importance_N.mean()
    return relative.clamp_min(_LEAST_IMPORTANCE)


def _rounded_dictionary(dictionary_IK: Tensor, bits: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The atoms as stored, in fp64, and their packed tensors; integers have one scale per atom."""
    if bits == 16:
        stored = bf16(dictionary_IK)
        return stored.double(), {"dictionary": stored}
    atoms_KI = dictionary_IK.T.float().contiguous()
    scale = search_scale(atoms_KI, bits)
    codes = quantize(atoms_KI, scale, bits)
    tensors = {
        "dictionary": pack_signed(codes.T.contiguous(), bits),
        "dictionary_scale": scale.squeeze(1).to(SCALE_DTYPE),
    }
    return dequantize(codes, scale, groups_of(codes.shape[1], bits, 0)).T.double(), tensors


def flops(in_features: int, out_features: int, spec: Spec, config: Config) -> float:
    """Operations of `compress`, in units of a fast fp32 product: slower steps count for what they take of one."""
    learned, nonzeros = spec["num_atoms"], spec["num_nonzeros"]
    atoms = learned + (in_features if spec["unit_atoms"] else 0)
    rounding = 0.0
    if spec["value_bits"] < 16:
        passes = 1 + (1 + config.polish) * config.polish
        rounding = 25 * atoms**3 + 10 * passes * atoms**2 * out_features
    step, whiten = 2 * atoms**2 * out_features, 25 * in_features**3
    if spec["unit_atoms"]:
        pruning = 6 * config.rounds * 2 * in_features**2 * out_features + 10 * in_features**3
        refit = min(config.refit_steps, 12) * 2 * step  # in fp64
        pursued = 10 * (config.thresholds + 1) * step * (3 if learned else 2 * nonzeros < in_features)
        return rounding + pruning + refit + pursued + (whiten if learned else 0)
    rounding += 80 * step
    if config.solver == "ksvd":
        coding = 40 * out_features * learned * nonzeros**2 / 2  # bound by memory, not arithmetic
        sweep = 20 * in_features * out_features * nonzeros * (2 * config.power_iterations + 2)
        return rounding + whiten + config.iterations * (coding + sweep)
    product, select = 2 * in_features * out_features * learned, 4000 * out_features * learned
    orthonormal = config.iterations * (2 * product + select + 25 * learned**3 + 8 * in_features * learned**2)
    return rounding + whiten + orthonormal + config.refits * (2 * product + select + 16 * learned**2 * out_features)
