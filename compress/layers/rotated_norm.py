"""RMSNorm whose gain lives in a rotated basis: the final norm of a rotated model with tied embeddings.

y = (x / rms(x)) M^T with M = U^T diag(g) U, symmetric. A diagonal gain does not commute with a rotation; as a matrix in
front of the tied embedding it costs d^2 numbers, while untying would cost vocabulary x d.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from compress.layers import CompressedLinear, Spec, TensorSpec


class Layer(CompressedLinear):
    """Stands for a norm, not for a linear. Spec: `epsilon`, and the same `in_features` and `out_features`."""

    format = "rotated_norm"
    sizes: ClassVar = {"epsilon": float}

    @classmethod
    def tensors(cls, spec: Spec) -> dict[str, TensorSpec]:
        width = spec["in_features"]
        if width != spec["out_features"] or not 0 <= spec["epsilon"] < 1:
            raise ValueError(f"impossible norm of {width} to {spec['out_features']} with epsilon {spec['epsilon']}")
        return {"weight": ((width, width), torch.bfloat16)}

    @classmethod
    def stands_for(cls, spec: Spec, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return weight is not None and tuple(weight.shape) == (spec["in_features"],)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.spec["epsilon"])
        return wide.to(x.dtype) @ self.weight.to(x.dtype).T

    def dense_weight(self) -> Tensor:
        return self.weight.float()
