"""What the methods that store integers share: their options, their spec, and the way from a weight to packed tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from compress.layers import Spec
from compress.layers.mixed_precision import column_groups, packed_tensors, stored_gram, to_storage
from compress.linalg import SecondMoment
from compress.methods import MethodConfig, Site
from compress.quantizer import Group
from compress.solvers import gptq

_WORTH_CLIPPING = 128  # values that share a scale; the largest of fewer normal numbers lies no farther out than the best cut
Solve = Callable[[Tensor, Tensor, list[Group]], tuple[Tensor, Tensor]]


class IntegerConfig(MethodConfig):
    """Widths and groups."""

    bits: int = Field(4, ge=2, le=8, description="bits of a weight")
    group_size: int = Field(128, ge=0, description="input columns that share a scale; 0: one scale per output channel")
    activation_bits: Literal[4, 8, 16] = Field(16, description="inputs rounded per token on the fly; 16: left as they are")
    activation_clip: float = Field(
        0.0, ge=0, lt=100, description="4-bit inputs are cut at so many root mean squares of what shares a scale; 0: never"
    )
    scale_steps: int = Field(24, ge=1, description="shrunken ranges tried for every scale; 1: the largest weight decides")
    scale_power: float = Field(2.0, gt=0, description="exponent of the error that picks a scale")


class GptqConfig(IntegerConfig):
    """Options of `compress.solvers.gptq`."""

    rounded_inputs: bool = Field(False, description="fit the weight to inputs as they are rounded when it runs")
    damping: float = Field(0.01, ge=0, description="added to the Gram matrix, relative to its mean diagonal")
    activation_order: bool = Field(True, description="round the columns with the largest inputs first")
    sweeps: int = Field(2, ge=0, description="passes of coordinate descent after the loop")
    refits: int = Field(2, ge=0, description="least-squares refits of the scales, each followed by the sweeps")


def integer_spec(
    site: Site, config: IntegerConfig, *, high_features: int = 0, high_bits: int = 8, hadamard: bool = False
) -> Spec:
    """The spec of a site. Rounded inputs of o_proj get a scale per head, as in QuaRot and ResQ."""
    by_head = site.inputs == "heads" and config.activation_bits < 16
    sharing = (site.in_features - high_features) // (site.heads if by_head else 1)
    return {
        "format": "mixed_precision",
        "bits": config.bits,
        "group_size": config.group_size if config.group_size < site.in_features else 0,
        "high_features": high_features,
        "high_bits": high_bits,
        "heads": site.heads if site.inputs == "heads" and high_features else 0,
        "hadamard": hadamard,
        "activation_bits": config.activation_bits,
        "activation_groups": site.heads if by_head else 1,
        "clip": config.activation_clip if sharing >= _WORTH_CLIPPING else 0.0,
    }


def to_packed(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, solve: Solve) -> dict[str, Tensor]:
    """Quantize in the coordinates of the storage; `solve(weight, gram, groups)` gives codes and scales."""
    weight, gram = to_storage(spec, weight_NI.double()), stored_gram(spec, inputs.gram_II)
    codes, scales = solve(weight.float(), gram, column_groups(spec))
    return packed_tensors(spec, codes, scales)


def gptq_packed(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: GptqConfig) -> dict[str, Tensor]:
    """Quantize with error feedback."""
    solve = partial(
        gptq.solve,
        damping=config.damping,
        activation_order=config.activation_order,
        sweeps=config.sweeps,
        refits=config.refits,
        steps=config.scale_steps,
        power=config.scale_power,
    )
    return to_packed(weight_NI, inputs, spec, solve)


def gptq_flops(in_features: int, out_features: int, config: GptqConfig) -> float:
    """Factorizations in fp64, then memory-bound column steps: about ten times their arithmetic."""
    passes = 1 + (1 + config.refits) * config.sweeps
    return 25 * in_features**3 + 10 * passes * in_features**2 * out_features
