"""QuaRot: spread outliers with Hadamard rotations, then quantize everything to one width.

Paper: QuaRot, arXiv:2404.00456. The residual stream is rotated by a Hadamard matrix with random signs, values and the
input of o_proj by one per head, the input of down_proj online: `compress.rotation` and the storage layer. The rival of
ResQ, which orders directions by size instead of mixing them all. GPTQ as in `compress.solvers.gptq`.
Cost: that of GPTQ; the bases need no statistics.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from compress.layers import Spec
from compress.linalg import SecondMoment
from compress.methods import MAX_SEED, Site
from compress.methods._integers import GptqConfig, gptq_flops, gptq_packed, integer_spec
from compress.rotation import Wanted


class Config(GptqConfig):
    group_size: int = Field(0, ge=0, description="input columns that share a scale; 0: one scale per output channel")
    online: bool = Field(
        False,
        description="transform the stream at every linear instead of folding it; for Gemma, Phi-3",
    )
    heads_basis: Literal["hadamard", "none"] = Field("hadamard", description="of the values; none for Phi-3")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="the random signs")


def rotation(config: Config, hidden_size: int, head_dim: int) -> Wanted:
    """What `compress.bases` is asked to fold."""
    return Wanted(stream="none" if config.online else "hadamard", heads=config.heads_basis, seed=config.seed)


def plan(site: Site, config: Config) -> Spec:
    """Packed integers of one width, behind a Hadamard transform in down_proj and wherever none is folded."""
    return integer_spec(site, config, hadamard=site.inputs == "hidden" or (config.online and site.inputs == "stream"))


def compress(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> dict[str, Tensor]:
    """Packed tensors of the (already rotated) weight; see `compress.methods`."""
    return gptq_packed(weight_NI, inputs, spec, config)


def flops(in_features: int, out_features: int, spec: Spec, config: Config) -> float:
    """See `gptq_flops`."""
    return gptq_flops(in_features, out_features, config)
