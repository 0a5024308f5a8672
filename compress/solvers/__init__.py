"""Solvers of the column-sparse factorization Y ~= D S, one file each, one interface.

    solve(target_IN, num_atoms, num_nonzeros, ...) -> SparseFactors

They know nothing of models, recipes or storage: tensors in, tensors out, inputs never written to.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SparseFactors:
    """Y `[I, N]` ~= dictionary `[I, K]` @ codes `[N, K]`^T with `num_nonzeros` entries in every row of `mask`.

    The mask is kept beside the codes because a code on the support may be exactly zero.
    """

    dictionary_IK: Tensor
    codes_NK: Tensor
    mask_NK: Tensor

    def relative_error(self, target_IN: Tensor) -> float:
        """||Y - D S||_F^2 / ||Y||_F^2, in fp64."""
        residual = target_IN.double() - self.dictionary_IK.double() @ self.codes_NK.double().T
        return float(residual.square().sum() / target_IN.double().square().sum())
