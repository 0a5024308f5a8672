"""Dense dictionary times column-sparse codes, the storage of CoSpaDi; layout: `compress.kernels.sparse_dictionary`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from compress.kernels.sparse_dictionary import expand_codes, sparse_dictionary, unpack_mask
from compress.layers import CompressedLinear, Spec, TensorSpec


class Layer(CompressedLinear):
    """y = (x D) S + b. Spec: `num_atoms` (K, a multiple of 8) and `num_nonzeros` (s) per output neuron."""

    format = "sparse_dictionary"
    sizes: ClassVar = {"num_atoms": int, "num_nonzeros": int}

    @classmethod
    def tensors(cls, spec: Spec) -> dict[str, TensorSpec]:
        inputs, outputs = spec["in_features"], spec["out_features"]
        atoms, nonzeros = spec["num_atoms"], spec["num_nonzeros"]
        if not 1 <= nonzeros <= atoms or atoms % 8:
            raise ValueError(f"impossible sizes: {nonzeros} nonzeros of {atoms} atoms (a multiple of 8 is expected)")
        return {
            "dictionary": ((inputs, atoms), torch.bfloat16),
            "values": ((outputs, nonzeros), torch.bfloat16),
            "mask": ((outputs, atoms // 8), torch.uint8),
        }

    @classmethod
    def check(cls, spec: Spec, tensors: dict[str, Tensor]) -> None:
        counts = unpack_mask(tensors["mask"]).sum(dim=1)
        wrong = counts.ne(spec["num_nonzeros"]).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"mask of output {row} has {int(counts[row])} bits set, but {spec['num_nonzeros']} values are stored"
            )

    def forward(self, x: Tensor) -> Tensor:
        y = sparse_dictionary(x, self.dictionary, self.values, self.mask)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        return expand_codes(self.values.float(), self.mask) @ self.dictionary.float().T
