"""GPTQ: weights rounded one column at a time, each error taken up by the columns that follow, then polished.

Paper: GPTQ, arXiv:2210.17323; the solver is `compress.solvers.gptq`. Where we differ: after the paper's loop, passes of
coordinate descent on the same objective move single codes, and the scales are refitted by least squares for the codes
found; `sweeps: 0, refits: 0` is the paper's method. Statistics come from already quantized predecessors unless
`calibration.inputs` says otherwise.
Cost: I^3 for the factorizations and (2 + sweeps) N I^2 per matrix.
"""

from __future__ import annotations

from torch import Tensor

from compress.layers import Spec
from compress.linalg import SecondMoment
from compress.methods import Site
from compress.methods._integers import GptqConfig, gptq_flops, gptq_packed, integer_spec


class Config(GptqConfig):
    pass


def plan(site: Site, config: Config) -> Spec:
    """Packed integers of one width."""
    return integer_spec(site, config)


def compress(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> dict[str, Tensor]:
    """Packed tensors of the weight; see `compress.methods`."""
    return gptq_packed(weight_NI, inputs, spec, config)


def flops(in_features: int, out_features: int, spec: Spec, config: Config) -> float:
    """See `gptq_flops`."""
    return gptq_flops(in_features, out_features, config)
