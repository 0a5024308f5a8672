"""Solvers, one file each. Those that learn a whole column-sparse factorization Y ~= D S have one interface,

    solve(target_IN, num_atoms, num_nonzeros, ...) -> SparseFactors

the others find a support, codes or integers for atoms that are given.

They know nothing of models, recipes or storage: tensors in, tensors out, inputs never written to. They square the entries
of Y in its own dtype: the caller scales Y so that the largest is near one (`compress.linalg.power_of_two`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
        """||Y - D S||_F^2 / ||Y||_F^2, in fp64; 0 for Y = 0."""
        residual = target_IN.double() - self.dictionary_IK.double() @ self.codes_NK.double().T
        whole = target_IN.double().square().sum()
        return float(residual.square().sum() / whole) if whole > 0 else 0.0


def zero_factors(target_IN: Tensor, num_atoms: int, num_nonzeros: int) -> SparseFactors:
    """What every solver answers for Y = 0: zero codes. Nothing can be learned from it, and norms of it divide by zero."""
    rows, columns = target_IN.shape
    options = {"device": target_IN.device, "dtype": target_IN.dtype}
    codes_NK = torch.zeros(columns, num_atoms, **options)
    mask_NK = torch.zeros_like(codes_NK, dtype=torch.bool)
    mask_NK[:, :num_nonzeros] = True
    return SparseFactors(torch.eye(rows, num_atoms, **options), codes_NK, mask_NK)
