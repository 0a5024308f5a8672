"""ResQ: rotate into principal components, keep the largest few in 8 bits, everything else in 4.

Paper: ResQ, arXiv:2412.14363. Each input is expressed in an orthonormal basis U = [U_l | U_h]: U_h spans the r directions
of largest second moment, U_l the rest, and inside either a random rotation evens the coordinates out. The r coefficients
take 8 bits, the others `bits`; the weight's columns get the same widths, so no product mixes precisions. U_A (stream) is
one basis for the whole model, U_B (heads) one per KV head; both are folded into the weights (`compress.rotation`). The
input of down_proj gets a Hadamard transform instead, in its storage layer. The KV cache's part is `compress.cache`.

Where we differ: tied embeddings stay tied and are not damaged during calibration (the released basis script scales them by
the final norm); merges are fp64 with one rounding; GPTQ is polished (`compress.solvers.gptq`); no mean is subtracted from
the embedding, which is not invariant under RMSNorm.
`allocation: search` finds every matrix its width, on the rotated model (`compress.trials`).
Cost: one more pass over the calibration text, one d x d eigendecomposition, one per KV head.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from compress.layers import Spec
from compress.linalg import SecondMoment
from compress.methods import MAX_SEED, Site
from compress.methods._budget import WIDTHS, BudgetConfig
from compress.methods._integers import GptqConfig, gptq_flops, gptq_packed, integer_spec
from compress.rotation import Wanted, high_channels, high_per_head

_RATIO = 0.75


class Config(GptqConfig, BudgetConfig):
    ratio: float = Field(
        _RATIO, ge=0, lt=1, description="what a search removes of the bf16 bytes; without one, `bits` decides"
    )
    group_size: int = Field(0, ge=0, description="input columns that share a scale; 0: one scale per precision part")
    high_bits: int = Field(
        8, ge=2, le=8, description="bits of weights and rounded inputs on the largest directions; as many more in a search"
    )
    high_share: float = Field(0.125, ge=0, le=0.5, description="share of directions in high precision; r is near it")
    heads_high_share: float | None = Field(None, ge=0, le=0.5, description="the same for o_proj; null: as high_share")
    hidden_high_share: float = Field(0.0, ge=0, le=0.5, description="the same for the input of down_proj")
    stream_basis: Literal["pca", "hadamard", "order", "none"] = Field(
        "pca",
        description="U_A, of the stream; order: a permutation and an online Hadamard transform, for Gemma and Phi-3",
    )
    heads_basis: Literal["pca", "hadamard", "none"] = Field("pca", description="U_B, of the values")
    hadamard: bool = Field(True, description="U_D, the transform of down_proj's input")
    weight_share: float = Field(0.0, ge=0, le=1, description="share of the weights' own moments in what picks directions")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="the random rotations inside the parts")

    @model_validator(mode="after")
    def _has_something_to_search(self) -> Config:
        sized = self.target_size is not None or self.target_bits is not None or self.ratio != _RATIO
        if self.allocation == "uniform" and sized:
            raise ValueError(
                "ratio, target_size and target_bits need allocation: search, as resq-75 has it; else bits decides"
            )
        if self.allocation == "search" and self.activation_bits < 16:
            raise ValueError("allocation: search does not see what rounded inputs cost; give activation_bits: 16")
        return self


def alternatives(site: Site, config: Config) -> list[Config]:
    """The widths to try for a matrix; the high part has as many bits more as the recipe says, where there are so many."""
    if config.allocation == "uniform":
        return [config]
    more = config.high_bits - config.bits
    return [config.model_copy(update={"bits": bits, "high_bits": min(max(2, bits + more), 8)}) for bits in WIDTHS]


def quick(config: Config) -> Config:
    """The same at less expense: enough to compare widths by."""
    return config.model_copy(update={"sweeps": 0, "refits": 0})


def solves_neurons_alone(config: Config) -> bool:
    """Whether a neuron's codes are the same whichever others there are."""
    return True


def rotation(config: Config, hidden_size: int, head_dim: int) -> Wanted:
    """What `compress.bases` is asked to gather and fold."""
    return Wanted(
        stream=config.stream_basis,
        stream_high=high_channels(hidden_size, config.high_share),
        heads=config.heads_basis,
        heads_high=high_per_head(head_dim, _heads_share(config)),
        hidden_order=config.hidden_high_share > 0,
        weight_share=config.weight_share,
        seed=config.seed,
    )


def _heads_share(config: Config) -> float:
    return config.high_share if config.heads_high_share is None else config.heads_high_share


def plan(site: Site, config: Config) -> Spec:
    """Two precisions where there is a basis to order the columns by, one elsewhere.

    Raises:
        ValueError: a site too narrow for its high part; a search on what lies outside the blocks.
    """
    if config.allocation == "search" and site.inputs == "other":
        raise ValueError("a search is for the matrices of a block; give this one a rule of its own, with bits")
    high, hadamard = 0, False
    if site.inputs == "stream" and config.stream_basis in ("pca", "order"):
        high = high_channels(site.in_features, config.high_share)
        hadamard = config.stream_basis == "order"
    elif site.inputs == "heads" and config.heads_basis == "pca":
        high = site.heads * high_per_head(site.in_features // site.heads, _heads_share(config))
    elif site.inputs == "hidden":
        high, hadamard = high_channels(site.in_features, config.hidden_high_share), config.hadamard
    if high >= site.in_features:
        raise ValueError(f"{high} high-precision channels of {site.in_features}; lower weights.high_share")
    return integer_spec(site, config, high_features=high, high_bits=config.high_bits, hadamard=hadamard)


def compress(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> dict[str, Tensor]:
    """Packed tensors of the (already rotated) weight; see `compress.methods`."""
    return gptq_packed(weight_NI, inputs, spec, config)


def flops(in_features: int, out_features: int, spec: Spec, config: Config) -> float:
    """See `gptq_flops`."""
    return gptq_flops(in_features, out_features, config)
