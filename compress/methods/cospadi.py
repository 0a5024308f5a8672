"""CoSpaDi: a weight as a dense dictionary times column-sparse codes, fitted to the layer's outputs.

Paper: CoSpaDi, arXiv:2509.22075.

minimise ||X (W - D S)||_F over D `[I, K]` and S `[K, N]` with s nonzeros in every column of S (columns are output
neurons). With X^T X = L^T L this is ordinary sparse dictionary learning of Y = L W, and D = L^{-1} D_L afterwards: it is
SVD-LLM with a union of subspaces in place of one.

Where we differ from the paper: the default solver is `orthogonal` (`compress.solvers.orthogonal`; `ksvd` is the paper's);
whitening by eigh in fp64 with relative damping; after the dictionary is rounded to bf16 the codes are refitted to the
rounded atoms on the exact Gram matrix; bytes count the mask, which the paper hides in 14-bit coefficients; inputs are on
the dictionary side, as the theory needs (the sizes in the paper's Table 10 have the two sides swapped).
Left out: cross-layer groups, other dictionaries. Cost: one I x I eigh plus the solver.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.kernels.sparse_dictionary import pack_mask
from compress.layers import Spec
from compress.linalg import SecondMoment, power_of_two
from compress.methods import MAX_SEED, MethodConfig, Site, bf16
from compress.solvers import ksvd, orthogonal


class Config(MethodConfig):
    ratio: float = Field(0.2, gt=0, lt=1, description="fraction of the bf16 bytes to remove, mask counted")
    atoms_per_nonzero: float = Field(2.0, ge=1, le=16, description="rho = K / s, before rounding")
    solver: Literal["orthogonal", "ksvd"] = Field("orthogonal", description="ksvd is the paper's, for reference")
    iterations: int = Field(6, ge=1, description="rounds of the solver (the paper's ksvd: 60)")
    refits: int = Field(12, ge=0, description="orthogonal: rounds with a free dictionary")
    power_iterations: int = Field(6, ge=1, description="ksvd: power iterations per atom")
    damping: float = Field(1e-6, ge=0, description="added to the Gram matrix, relative to its mean diagonal")
    seed: int = Field(42, ge=0, le=MAX_SEED, description="ksvd: the random start")


def plan(site: Site, config: Config) -> Spec:
    """K and s that fill (1 - ratio) of the dense bytes: 2 I K + 2 s N + N K / 8.

    K is rounded to a multiple of 32 (one mask word; of 8 for small layers) and s takes what is left, down to a multiple
    of 8 (16 bytes of values), so rounding never exceeds the budget.
    """
    in_features, out_features = site.in_features, site.out_features
    budget = (1 - config.ratio) * 2 * in_features * out_features
    per_atom = 2 * in_features + 2 * out_features / config.atoms_per_nonzero + out_features / 8
    atoms = min(budget / per_atom, in_features if config.solver == "orthogonal" else float("inf"))
    multiple = 32 if atoms >= 128 else 8
    atoms = int(atoms) // multiple * multiple
    nonzeros = int((budget - atoms * (2 * in_features + out_features / 8)) / (2 * out_features))
    nonzeros = min(nonzeros, atoms, in_features)
    nonzeros = nonzeros // 8 * 8 if nonzeros >= 64 else nonzeros
    if atoms < 8 or nonzeros < 1:
        raise ValueError(f"ratio {config.ratio} leaves no room for a dictionary at {in_features} x {out_features}")
    return {"format": "sparse_dictionary", "num_atoms": atoms, "num_nonzeros": nonzeros}


def compress(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> dict[str, Tensor]:
    """Packed dictionary, values and mask of the weight; see `compress.methods`."""
    whiten, unwhiten = inputs.whitening(config.damping)
    target_IN = whiten @ weight_NI.double().T
    scale = power_of_two(target_IN)
    target_IN = (target_IN / scale).float()  # solvers run in fp32, where the squares of tiny weights would vanish
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
    stored = bf16(dictionary / norm)
    codes = _refit_to_stored(weight_NI, inputs.gram_II, stored, factors.codes_NK.double() * (scale * norm), factors.mask_NK)
    values = codes[factors.mask_NK].view(len(codes), spec["num_nonzeros"])  # row by row, ascending atoms
    return {"dictionary": stored, "values": bf16(values), "mask": pack_mask(factors.mask_NK)}


def flops(in_features: int, out_features: int, spec: Spec, config: Config) -> float:
    """Operations of `compress`, in units of a fast fp32 product: slower steps count for what they take of one."""
    atoms, nonzeros = spec["num_atoms"], spec["num_nonzeros"]
    whiten = 25 * in_features**3
    if config.solver == "ksvd":
        coding = 40 * out_features * atoms * nonzeros**2 / 2  # bound by memory, not arithmetic
        sweep = 20 * in_features * out_features * nonzeros * (2 * config.power_iterations + 2)
        return whiten + config.iterations * (coding + sweep)
    product, select = 2 * in_features * out_features * atoms, 4000 * out_features * atoms
    orthonormal = config.iterations * (2 * product + select + 25 * atoms**3 + 8 * in_features * atoms**2)
    return whiten + orthonormal + config.refits * (2 * product + select + 16 * atoms**2 * out_features)


def _refit_to_stored(weight_NI: Tensor, gram_II: Tensor, stored_IK: Tensor, codes_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """Codes for the dictionary as stored: L^{-1} amplifies its rounding in weak directions, a refit takes that up."""
    atoms = stored_IK.double()
    image_IK = gram_II @ atoms
    return orthogonal.refit_codes(atoms.T @ image_IK, weight_NI.double() @ image_IK, codes_NK, mask_NK, steps=5)
