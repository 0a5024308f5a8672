"""Streaming second moments of layer inputs.

G = (1/T) sum over tokens of x x^T, uncentred. Products are fp32, the running sum fp64: a sum of 10^5 fp32 products of
mixed size would lose the small directions that whitening divides by. Sums merge, so processes can share the tokens.

Legend: T tokens, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_COLUMNS = 512


class HeadGrams:
    """One Gram matrix per head: `[heads, head_dim, head_dim]`, from states `[batch, heads, tokens, head_dim]`."""

    def __init__(self) -> None:
        self.sum_HDD: Tensor | float = 0.0
        self.tokens = 0

    def add(self, x: Tensor, mask: Tensor | None = None, skip: int = 0) -> None:
        """Add states; `mask` `[batch, tokens]` is true for the tokens that count, the first `skip` of each row do not."""
        keep = x.new_ones(x.shape[0], x.shape[2], dtype=bool) if mask is None else mask.to(x.device).bool()
        keep = keep & (keep.cumsum(dim=1) > skip)
        rows_HTD = x.detach().transpose(1, 2)[keep].transpose(0, 1).float()
        self.sum_HDD = self.sum_HDD + (rows_HTD.transpose(1, 2) @ rows_HTD).double()
        self.tokens += rows_HTD.shape[1]

    def mean(self) -> Tensor:
        """Second moments per token, fp64; ValueError when no token was seen."""
        if self.tokens == 0:
            raise ValueError("no token was seen")
        return self.sum_HDD / self.tokens


class SeenGram:
    """Moments of the inputs x that a layer should answer and of what it sees in their place, x' (rounded, or behind
    compressed blocks): E[x x^T], E[x' x'^T] and E[x x'^T]. Memory: three times that of `Gram`.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.target, self.seen = Gram(width, device), Gram(width, device)
        self.cross_II = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, target: Tensor, seen: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add inputs `[..., I]` and what is seen of them; `mask` and `weights` as in `Gram.add`."""
        self.target.add(target, mask, weights)
        self.seen.add(seen, mask, weights)
        target_TI, seen_TI = _counted(target, mask, weights), _counted(seen, mask, weights)
        self.cross_II += (target_TI.T @ seen_TI).double()


def _counted(x: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """The tokens that count, `[T, I]` fp32, times the roots of their weights."""
    x_TI = x.detach().reshape(-1, x.shape[-1])
    roots_T1 = None if weights is None else weights.reshape(-1, 1).to(x.device).sqrt()
    if mask is not None:
        keep = mask.reshape(-1).to(x.device).bool()
        x_TI, roots_T1 = x_TI[keep], roots_T1 if roots_T1 is None else roots_T1[keep]
    return x_TI.float() if roots_T1 is None else x_TI.float() * roots_T1


class Gram:
    """Sum of x x^T and the number of tokens in it. Memory: I^2 x 8 bytes."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add inputs `[..., I]`; `mask` `[...]` is true for the tokens that count, padding is left out; a token's products
        count `weights` `[...]` times."""
        x_TI = _counted(x, mask, weights)
        # The product is symmetric: only the blocks on and above the diagonal are computed.
        for start in range(0, x_TI.shape[1], _BLOCK_COLUMNS):
            rows = slice(start, start + _BLOCK_COLUMNS)
            self.sum_II[rows, start:] += (x_TI[:, rows].T @ x_TI[:, start:]).double()
        self.tokens += len(x_TI)

    def merge(self, other: Gram) -> None:
        """Add the statistics of other tokens."""
        self.sum_II += other.sum_II
        self.tokens += other.tokens

    def mean(self) -> Tensor:
        """The Gram matrix per token, `[I, I]` fp64; ValueError when no token was seen."""
        if self.tokens == 0:
            raise ValueError("no token was seen")
        upper = self.sum_II.triu()
        return (upper + upper.triu(1).T) / self.tokens
