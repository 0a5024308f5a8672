"""Columns of a packed weight that are stored together, and how the inputs they meet are rounded, as every kernel takes them.

A segment is a run of columns that share the scales of both sides: integer products are exact within one. On a CPU groups are
all: inputs rounded in narrower slices meet them in 15 bits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Columns `start` to `stop` of a weight: `packed` [N, bytes] codes of `bits`, a `scale` for every row and `group_size`
    columns (0: one).

    Inputs of `seen_bits` below 16 are rounded per token and each of `slices` equal runs of columns, cut at `clip` root mean
    squares (0: not).
    """

    packed: Tensor
    scale: Tensor
    bits: int
    start: int
    stop: int
    group_size: int
    seen_bits: int = 16
    slices: int = 1
    clip: float = 0.0

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def segment(self) -> int:
        """Columns that share all scales, as tensor cores walk them; 0 where they cannot."""
        step, of_slice = self.group_size or self.width, self.width // self.slices
        segment = step if self.slices == 1 else of_slice
        fits = self.slices == 1 or step % of_slice == 0
        return segment if fits and (segment == self.width or segment % 8 == 0) else 0
