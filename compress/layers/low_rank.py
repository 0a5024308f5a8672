"""Two dense factors: the storage of SVD-LLM and of any truncated SVD."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from compress.layers import CompressedLinear, Spec, TensorSpec


class Layer(CompressedLinear):
    """y = (x V) U + b with `down` = V^T `[R, I]` and `up` = U^T `[N, R]`, in nn.Linear's orientation. Spec: `rank`."""

    format = "low_rank"
    sizes: ClassVar = {"rank": int}

    @classmethod
    def tensors(cls, spec: Spec) -> dict[str, TensorSpec]:
        rank = spec["rank"]
        if rank < 1:
            raise ValueError(f"impossible rank {rank}")
        return {
            "down": ((rank, spec["in_features"]), torch.bfloat16),
            "up": ((spec["out_features"], rank), torch.bfloat16),
        }

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.down.to(x.dtype).T) @ self.up.to(x.dtype).T
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        return self.up.float() @ self.down.float()
