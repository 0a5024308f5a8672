"""y = (x D) S for a bitmask-packed, column-sparse S.

Layout, for N output neurons, K atoms (a multiple of 8) and s nonzeros per neuron:

    dictionary [I, K]        floating point, one atom per column
    values     [N, s]        floating point, the nonzeros of neuron n in ascending order of their atom
    mask       [N, K / 8]    uint8; atom 8 j + b of neuron n is used when bit b (least significant first) of byte j is set

At K = 2 s, one mask bit per atom is the entropy bound and costs 2 bits per nonzero; 16-bit indices would cost 16.
The reference expands S to dense and multiplies: correct everywhere, 2 K (I + N) flops per token, and no faster than the
dense layer. Accumulation and output are in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = tuple(1 << bit for bit in range(8))


def pack_mask(mask_NK: Tensor) -> Tensor:
    """Boolean `[N, K]` to uint8 `[N, K / 8]`; K must be a multiple of 8."""
    rows, atoms = mask_NK.shape
    if atoms % 8:
        raise ValueError(f"expected a multiple of 8 atoms, got {atoms}")
    weights = torch.tensor(_BITS, device=mask_NK.device, dtype=torch.int32)
    return (mask_NK.view(rows, atoms // 8, 8).int() * weights).sum(dim=2).to(torch.uint8)


def unpack_mask(mask: Tensor) -> Tensor:
    """uint8 `[N, K / 8]` to boolean `[N, K]`."""
    weights = torch.tensor(_BITS, device=mask.device, dtype=torch.uint8)
    return (mask[:, :, None] & weights).ne(0).flatten(1)


def expand_codes(values: Tensor, mask: Tensor) -> Tensor:
    """The dense `[N, K]` form of packed codes. Every row of the mask must hold `values.shape[1]` bits."""
    support = unpack_mask(mask)
    return values.new_zeros(support.shape).masked_scatter(support, values)


@torch.library.custom_op("compress::sparse_dictionary", mutates_args=())
def sparse_dictionary(x: Tensor, dictionary: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`[..., I]` to `[..., N]`; arguments as in the layout above."""
    codes_NK = expand_codes(values.to(x.dtype), mask)
    return (x @ dictionary.to(x.dtype)) @ codes_NK.T


@sparse_dictionary.register_fake
def _(x: Tensor, dictionary: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])
