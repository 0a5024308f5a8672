"""How the packed rows of a KV cache lie in memory, as every kernel that walks them must know.

A tensor is `[batch, heads, rows, width]`, a view of a buffer with room for more rows. Kernels take batch and heads as one
outer dimension with one stride.
"""

from __future__ import annotations

from torch import Tensor


def one_outer(tensor: Tensor) -> bool:
    """Whether batch and heads are one dimension in memory, and a row is dense."""
    batch, heads = tensor.shape[:2]
    return tensor.stride(-1) == 1 and (batch == 1 or heads == 1 or tensor.stride(0) == heads * tensor.stride(1))


def outer_stride(tensor: Tensor) -> int:
    """The stride of batch and heads as that one dimension."""
    return tensor.stride(1) if tensor.shape[1] > 1 else tensor.stride(0)


def tokens_of_row(packed: Tensor, bits: int, width: int) -> int:
    """Tokens in a packed row, whose `width` channels fill whole bytes."""
    return packed.shape[3] * 8 // bits // width
