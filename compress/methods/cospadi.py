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

from contextlib import suppress
from itertools import product
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.kernels.pack import pack_signed, packed_width
from compress.layers import Spec, dense_bytes, packed_bytes
from compress.layers.sparse_dictionary import all_atoms, atom_groups, packed_codes
from compress.linalg import SecondMoment, power_of_two
from compress.methods import MAX_SEED, Site, bf16
from compress.methods._budget import BudgetConfig
from compress.quantizer import SCALE_DTYPE, dequantize, groups_of, quantize, search_scale
from compress.solvers import elimination, gptq, ksvd, orthogonal, pursuit, union

_BALANCES = {"none": 0, "2:4": 4, "16:32": 32}
_WIDTHS = (2, 3, 4, 5, 6, 8)
_LEAST_USED = {3: 0.0, 4: 0.6}  # by the width of sparse codes, the share of nonzeros from which they are worth a trial
_LEARNED_WIDTHS = (4, 8)  # of codes of learned atoms
_LEAST_IMPORTANCE = 1e-3
Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]


class Config(BudgetConfig):
    dictionary: Literal["learned", "identity", "identity+learned", "auto"] = Field(
        "auto", description="the atoms: learned ones, unit vectors (a pruned weight), both, or what fits a matrix best"
    )
    value_bits: Bits | Literal["auto"] = Field(16, description="bits of a code; below 16 integers with scales; auto: tried")
    dictionary_bits: Bits = Field(16, description="bits of an entry of a learned atom")
    group_size: int = Field(128, ge=0, description="atoms whose codes share a scale; 0: one per neuron")
    balance: Literal["none", "2:4", "16:32"] = Field("none", description="identity: as many weights of every 4 or 32")
    weighting: Literal["none", "fisher"] = Field(
        "none", description="learned: neurons count alike, or by how much the model's output minds their errors"
    )
    learned_share: float = Field(1 / 32, gt=0, le=0.5, description="identity+learned: learned atoms per input feature")
    rounds: int = Field(16, ge=1, description="identity: rounds in which weights are pruned")
    thresholds: int = Field(3, ge=0, description="hard-thresholding steps that end the search for a support")
    refit_steps: int = Field(40, ge=0, description="conjugate-gradient steps of the final codes, at most")
    polish: int = Field(2, ge=0, description="integers: sweeps of coordinate descent, and refits of the scales")
    atoms_per_nonzero: float = Field(2.0, ge=1, le=16, description="learned: rho = K / s, before rounding")
    solver: Literal["orthogonal", "ksvd"] = Field("orthogonal", description="learned: ksvd is the paper's, for reference")
    iterations: int = Field(6, ge=1, description="learned: rounds of the solver (the paper's ksvd: 60)")
    refits: int = Field(12, ge=0, description="orthogonal: rounds with a free dictionary")
    power_iterations: int = Field(6, ge=1, description="ksvd: power iterations per atom")
    damping: float = Field(1e-6, ge=0, description="added to the Gram matrix, relative to its mean diagonal")
    seed: int = Field(42, ge=0, le=MAX_SEED, description="ksvd: the random start")

    @field_validator("balance", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """YAML 1.1 reads an unquoted 2:4 as minutes and seconds."""
        return {2 * 60 + 4: "2:4", 16 * 60 + 32: "16:32"}.get(value, value) if isinstance(value, int) else value

    def keeps_enough(self, ratio: float, stored_bytes: int, dense_bytes: int) -> bool:
        """As in every search; of a given width not all that a ratio leaves is used, so bytes decide, to some per cent."""
        if self.value_bits != "auto":
            return super().keeps_enough(ratio, stored_bytes, dense_bytes)
        return stored_bytes >= 0.95 * self.least_kept() * dense_bytes

    @model_validator(mode="after")
    def _has_atoms_to_weigh(self) -> Config:
        if self.weighting != "none" and self.dictionary == "identity":
            raise ValueError("weighting: fisher is for learned atoms; dictionary: identity fits every neuron by itself")
        return self


def kinds(site: Site, config: Config) -> list[Config]:
    """The dictionaries to compare at equal bytes.

    With atoms in bf16 a matrix with more inputs than outputs (k_proj, v_proj, down_proj) takes unit vectors untried: learned
    atoms won on one of 180 that were measured (docs/log.md), and took two fifths of the time of all trials.
    """
    names = ("identity", "identity+learned", "learned") if config.dictionary == "auto" else (config.dictionary,)
    if config.dictionary == "auto" and site.in_features > site.out_features and config.dictionary_bits == 16:
        names = ("identity",)
    return [config.model_copy(update={"dictionary": name}) for name in names]


def alternatives(site: Site, config: Config) -> list[Config]:
    """The widths and ratios to try for a matrix, of one kind of dictionary.

    Few wide codes lose to more narrow ones. Sparse ones are better than a mixture of dense ones at most from 2.3 to 2.9 bits
    per weight, and all there is below 2; of 4 bits they fill the steps between dense widths.
    """
    if config.value_bits != "auto":
        return [config.model_copy(update={"ratio": ratio}) for ratio in config.ratios()]
    tries = []
    for ratio, bits in product(config.ratios(), _WIDTHS):
        one = config.model_copy(update={"ratio": ratio, "value_bits": bits})
        with suppress(ValueError):
            spec = plan(site, one)
            used = spec["num_nonzeros"] / _most_used(site, config)
            worth_it = bits in _LEARNED_WIDTHS if spec["num_atoms"] else used >= _LEAST_USED.get(bits, 1)
            spec |= {"in_features": site.in_features, "out_features": site.out_features, "bias": False}
            if worth_it and config.keeps_enough(ratio, packed_bytes(spec), dense_bytes(spec)):
                tries.append(one)
    return tries


def solves_neurons_alone(config: Config) -> bool:
    """Whether a neuron's codes are the same whichever others there are."""
    return config.dictionary == "identity"


def quick(config: Config) -> Config:
    """The same at less expense: enough to compare alternatives by."""
    steps = 4 if config.value_bits == 16 else 0  # GPTQ makes good what is left off
    least = {"iterations": 1, "refits": 2, "rounds": 4, "thresholds": 0, "refit_steps": steps, "polish": 0}
    return config.model_copy(update=least)


def plan(site: Site, config: Config) -> Spec:
    """The sizes that fill (1 - ratio) of the dense bytes; rounding never exceeds them.

    What is open, `auto`, is planned as unit vectors and as the widest codes that all weights may have, or pruned ones of 3
    bits, until it is decided.

    With learned atoms K is a multiple of 32 (of 8 for small layers); s takes what atoms, mask and scales leave, down to a
    multiple of 4 or 8. Where integers of all weights fit, none is pruned and there is no mask.
    """
    balance = _BALANCES[config.balance]
    if config.dictionary == "auto":
        config = config.model_copy(update={"dictionary": "identity"})
    if config.value_bits == "auto":
        config = config.model_copy(update={"value_bits": _widest(site, config)})
    spec = {
        "format": "sparse_dictionary",
        "unit_atoms": config.dictionary != "learned",
        "num_atoms": 0,
        "num_nonzeros": 0,
        "value_bits": config.value_bits,
        "dictionary_bits": config.dictionary_bits,
        "group_size": config.group_size if config.value_bits < 16 and config.group_size < site.in_features else 0,
        "balance": balance,
    }
    budget = (1 - config.ratio) * 16 * site.in_features * site.out_features  # bits
    if config.dictionary != "identity":
        spec["num_atoms"] = _learned_atoms(site, config, budget)
    if balance:
        return {**spec, "num_nonzeros": _balanced(site, config, spec, budget)}
    nonzeros = _affordable(site, spec, budget)
    limit = all_atoms(spec | {"in_features": site.in_features})
    if config.dictionary == "learned":
        limit = min(limit, site.in_features)
    nonzeros = min(nonzeros, limit)
    multiple = 4 if config.value_bits == 16 else 8  # whole groups of 8 bytes, or of packed codes
    if nonzeros < limit and (nonzeros >= 64 or config.value_bits < 16):
        nonzeros = nonzeros // multiple * multiple
    if nonzeros < 1 or (spec["num_atoms"] < 8 and config.dictionary != "identity"):
        raise ValueError(f"ratio {config.ratio} leaves no room for a dictionary at {site.in_features} x {site.out_features}")
    return {**spec, "num_nonzeros": nonzeros}


def _most_used(site: Site, config: Config) -> int:
    """How many unit vectors a neuron may use."""
    return site.in_features if config.balance == "none" else site.in_features // 2


def _widest(site: Site, config: Config) -> int:
    for bits in reversed(_WIDTHS):
        with suppress(ValueError):
            spec = plan(site, config.model_copy(update={"value_bits": bits}))
            if spec["num_nonzeros"] >= _most_used(site, config):
                return bits
    return min(_LEAST_USED if config.dictionary == "identity" else _LEARNED_WIDTHS)


def _learned_atoms(site: Site, config: Config, budget: float) -> int:
    inputs, outputs, bits = site.in_features, site.out_features, config.value_bits
    if config.dictionary == "identity+learned":
        return max(8, round(config.learned_share * inputs / 8) * 8)
    per_atom = inputs * config.dictionary_bits + outputs * (bits / config.atoms_per_nonzero + 1)
    if bits < 16:
        per_atom += 16 * outputs / config.group_size if config.group_size else 0
    atoms = min(budget / per_atom, inputs if config.solver == "orthogonal" else float("inf"))
    multiple = 32 if atoms >= 128 else 8
    return int(atoms) // multiple * multiple


def _affordable(site: Site, spec: Spec, budget: float) -> int:
    """How many nonzeros of a neuron the budget pays for; all atoms where they fit without a mask."""
    inputs, outputs = site.in_features, site.out_features
    sized = spec | {"in_features": inputs}
    atoms, bits, learned = all_atoms(sized), spec["value_bits"], spec["num_atoms"]
    left = budget - 16 * len(atom_groups(sized)) * outputs * (bits < 16)
    if learned:
        width = spec["dictionary_bits"]
        left -= inputs * 16 * learned if width == 16 else inputs * 8 * packed_width(learned, width) + 16 * learned
    everything = 16 * atoms if bits == 16 else 8 * packed_width(atoms, bits)
    if everything * outputs <= left:
        return atoms
    return int((left / outputs - (atoms + 7) // 8 * 8) / bits)


def _balanced(site: Site, config: Config, spec: Spec, budget: float) -> int:
    """The nonzeros of a balanced support, which are given; ValueError when they do not fit."""
    balance = spec["balance"]
    if config.dictionary != "identity" or site.in_features % balance:
        raise ValueError(f"balance {config.balance} needs dictionary: identity and a multiple of {balance} inputs")
    nonzeros, fits = site.in_features // 2, _affordable(site, spec, budget)
    if fits < nonzeros:
        raise ValueError(f"balance {config.balance} at {config.value_bits} bits takes more than ratio {config.ratio} leaves")
    return nonzeros


def compress(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> dict[str, Tensor]:
    """Packed tensors of the weight; see `compress.methods`."""
    weight = weight_NI.double()
    scale = power_of_two(weight)
    weight = weight / scale  # solvers square what they get: tiny weights would vanish
    damping = config.damping * inputs.gram_II.diagonal().mean()
    gram = inputs.gram_II + damping * torch.eye(len(weight[0]), dtype=torch.float64, device=weight.device)
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
