"""Rows that grow: one tensor `[batch, heads, capacity, width]` that is appended to in place and doubled when full.

Every stored thing of every packed layer is such rows: packed codes, scales and minima, states kept exact. A row is a
token here; it may as well be a group of tokens. Appending n rows writes n rows; what is there is moved only when the
capacity doubles, so t appends move O(t) rows in all. The price is up to as much unused capacity as is used, which
`reserved_nbytes` reports and a caller who knows the final length avoids with the first capacity.

The tensor is always a normal one: made under `torch.inference_mode` it could not be written to outside of it, and a chat
may prefill in one mode and generate in the other. `PackedLayer` leaves inference mode around every call that allocates, and
so do copies and what is read from a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 16  # rows


def require_same(states: Tensor, batch: int, heads: int, width: int) -> None:
    """ValueError unless states are `[batch, heads, new tokens, width]`."""
    if (*states.shape[:2], states.shape[3]) != (batch, heads, width):
        expected = f"[{batch}, {heads}, new tokens, {width}]"
        raise ValueError(f"the cache holds states {expected}, got {list(states.shape)}; reset it, or make a new one")


def half_of(states: Tensor) -> torch.dtype:
    """The 16-bit dtype of scales and minima: the states' own, or bf16."""
    return states.dtype if states.dtype.itemsize == 2 else torch.bfloat16


class GrowingRows:
    """`length` rows of `width` values for every batch row and head."""

    def __init__(
        self, batch: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, capacity: int = 0
    ) -> None:
        self.length = 0
        self.data = torch.empty(batch, heads, capacity, width, dtype=dtype, device=device)

    def rows(self) -> Tensor:
        """`[batch, heads, length, width]`, a view."""
        return self.data[:, :, : self.length]

    def require_fit(self, states: Tensor) -> None:
        """ValueError unless `[batch, heads, new, width]` are rows of this batch, these heads and this width."""
        batch, heads, _, width = self.data.shape
        require_same(states, batch, heads, width)

    def reserve(self, new: int) -> None:
        """Make room for `new` more rows."""
        batch, heads, capacity, width = self.data.shape
        if self.length + new > capacity:
            grown = self.data.new_empty(batch, heads, max(self.length + new, 2 * capacity, _SMALLEST), width)
            grown[:, :, : self.length] = self.rows()
            self.data = grown

    def append(self, rows: Tensor) -> None:
        """Write rows `[batch, heads, new, width]` behind the last one."""
        self.reserve(rows.shape[2])
        self.data[:, :, self.length : self.length + rows.shape[2]] = rows
        self.length += rows.shape[2]

    def crop(self, length: int) -> None:
        """Forget every row from `length` on; the capacity stays."""
        self.length = min(self.length, length)

    def remove(self, start: int, count: int) -> None:
        """Forget `count` rows from `start` on; those behind them move up, and room for many more than are left is freed."""
        kept = torch.cat([self.data[:, :, :start], self.data[:, :, start + count : self.length]], dim=2)
        self.length -= count
        if self.data.shape[2] > 4 * max(self.length, _SMALLEST):
            batch, heads, _, width = self.data.shape
            self.data = self.data.new_empty(batch, heads, 2 * max(self.length, _SMALLEST), width)
        self.data[:, :, : self.length] = kept

    def select(self, indices: Tensor | Sequence[int]) -> None:
        """Batch rows in the order of `indices`, with repetitions; indices as tensors take them, masks included."""
        self.data = self.data[torch.as_tensor(indices, device=self.data.device)]

    def repeat(self, repeats: int) -> None:
        """Every batch row `repeats` times in a row."""
        self.data = self.data.repeat_interleave(repeats, dim=0)

    def to(self, device: torch.device | str) -> None:
        self.data = self.data.to(device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are used."""
        return self.rows().nbytes

    @property
    def reserved_nbytes(self) -> int:
        """Bytes allocated beyond them."""
        return self.data.nbytes - self.rows().nbytes
