"""RTN: every weight to the nearest code of its group. The floor that any other quantizer must beat.

The scale of a group is searched (`compress.quantizer`), its error weighted by how large each input is on the calibration
text; `scale_steps: 1` is the plain form, whose scale is the largest weight. Cost: two passes over the weight per step.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from compress.layers import Spec
from compress.linalg import SecondMoment
from compress.methods import Site
from compress.methods._integers import IntegerConfig, integer_spec, to_packed
from compress.quantizer import Group, round_to_nearest


class Config(IntegerConfig):
    activation_aware: bool = Field(True, description="weigh the error of a column by the energy of its input")


def plan(site: Site, config: Config) -> Spec:
    """Packed integers of one width."""
    return integer_spec(site, config)


def compress(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> dict[str, Tensor]:
    """Packed tensors of the weight; see `compress.methods`."""

    def solve(weight: Tensor, gram: Tensor, groups: list[Group]) -> tuple[Tensor, Tensor]:
        importance = gram.diagonal().float() if config.activation_aware else None
        return round_to_nearest(weight, groups, steps=config.scale_steps, power=config.scale_power, importance_I=importance)

    return to_packed(weight_NI, inputs, spec, solve)


def flops(in_features: int, out_features: int, spec: Spec, config: Config) -> float:
    """The scale search, memory-bound."""
    return 400 * config.scale_steps * in_features * out_features
