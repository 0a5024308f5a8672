"""CoSpaDi's options, and the sizes they give a matrix: atoms and nonzeros that fill its bytes, mask and scales counted.

What the sizes are for is in `compress.methods.cospadi`. Where options leave a matrix's dictionary, width or bytes open, here
is what is worth a trial, by what trials have shown (docs/log.md).
"""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from compress.kernels.pack import packed_width
from compress.layers import Spec
from compress.layers.sparse_dictionary import all_atoms, atom_groups
from compress.methods import MAX_SEED, Site
from compress.methods._budget import WIDTHS, BudgetConfig

_BALANCES = {"none": 0, "2:4": 4, "16:32": 32}
_LEAST_USED = {3: 0.0, 4: 0.6}  # by the width of sparse codes, the share of nonzeros from which they are worth a trial
_LEARNED_WIDTHS = (4, 8)  # of codes of learned atoms
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

    def fills_its_share(self) -> bool:
        """As in every search; a width or a dictionary that is still to be found takes no more, either."""
        return super().fills_its_share() or "auto" in (self.value_bits, self.dictionary)

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
    for ratio, bits in product(config.ratios(), WIDTHS):
        one = config.model_copy(update={"ratio": ratio, "value_bits": bits})
        with suppress(ValueError):
            spec = plan(site, one)
            used = spec["num_nonzeros"] / _most_used(site, config)
            worth_it = bits in _LEARNED_WIDTHS if spec["num_atoms"] else used >= _LEAST_USED.get(bits, 1)
            if worth_it:
                tries.append(one)
    return tries


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
        if spec["unit_atoms"] and spec["num_atoms"] > site.in_features:
            raise ValueError(f"{site.in_features} inputs have no room for {spec['num_atoms']} learned atoms")
    if balance:
        return {**spec, "num_nonzeros": _balanced(site, config, spec, budget)}
    nonzeros = _affordable(site, spec, budget)
    limit = all_atoms(spec | {"in_features": site.in_features})
    if config.dictionary == "learned":
        limit = min(limit, site.in_features)
    if nonzeros > limit:  # they need a mask all the same
        nonzeros = min(_affordable(site, spec, budget, masked=True), limit)
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
    for bits in reversed(WIDTHS):
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


def _affordable(site: Site, spec: Spec, budget: float, *, masked: bool = False) -> int:
    """How many nonzeros of a neuron the budget pays for; all atoms where they fit without a mask and none is asked for."""
    inputs, outputs = site.in_features, site.out_features
    sized = spec | {"in_features": inputs}
    atoms, bits, learned = all_atoms(sized), spec["value_bits"], spec["num_atoms"]
    left = budget - 16 * len(atom_groups(sized)) * outputs * (bits < 16)
    if learned:
        width = spec["dictionary_bits"]
        left -= inputs * 16 * learned if width == 16 else inputs * 8 * packed_width(learned, width) + 16 * learned
    everything = 16 * atoms if bits == 16 else 8 * packed_width(atoms, bits)
    if everything * outputs <= left and not masked:
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
