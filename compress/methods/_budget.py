"""What the methods that fill a number of bytes share: the budget, and how it is spread over the matrices."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field

from compress.methods import MethodConfig

WIDTHS = (2, 3, 4, 5, 6, 8)  # of integers that a search tries

# what a matrix may keep, relative to what it would keep if all kept the same: half at the least, or a search drives whole
# matrices to zero, which a sum of errors does not see (Swift-SVD)
_LEAST_SHARE = 0.5
_NEARLY = 0.95  # sizes come in steps: whole widths of integers, ranks, multiples of nonzeros
_SHARES = (_LEAST_SHARE, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)


class BudgetConfig(MethodConfig):
    """The budget of a rule."""

    ratio: float = Field(0.2, ge=0, lt=1, description="fraction of the bf16 bytes to remove, mask and scales counted")
    target_size: ByteSize | None = Field(
        None, description="bytes of all tensors of the checkpoint, as 180MB; replaces ratio"
    )
    target_bits: float | None = Field(None, gt=0, lt=16, description="bits per weight; replaces ratio")
    allocation: Literal["uniform", "search"] = Field(
        "uniform", description="the same ratio for every matrix, or more for those the output depends on"
    )

    def fills_its_share(self) -> bool:
        return self.allocation == "search"

    def least_kept(self) -> float:
        """Fraction of its bf16 bytes that a search leaves every matrix."""
        return _LEAST_SHARE * (1 - self.ratio)

    def keeps_enough(self, stored_bytes: int, dense_bytes: int) -> bool:
        """Whether a search may store a matrix in so many bytes."""
        return stored_bytes >= _NEARLY * self.least_kept() * dense_bytes

    def ratios(self) -> list[float]:
        """The ratios to try for a matrix."""
        if self.allocation == "uniform":
            return [self.ratio]
        kept = [share * (1 - self.ratio) for share in _SHARES]
        return [1 - share for share in kept if share < 1] + [0.0]
