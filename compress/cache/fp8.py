"""Keys and values in eight-bit floats, one scale per token and head: what most servers offer, as a plain rival.

    scale = max |x| / 448, rounded up to 16 bits        code = e4m3(x / scale)

e4m3 has 3 bits of mantissa, so an error is at most 1/16 of its number: small numbers keep their digits where eight-bit
integers lose them, large ones lose some that integers keep. 8 + 16 / head_dim bits per element.
Servers share one calibrated scale per tensor; a scale per token needs no calibration and costs a quarter of a bit at most.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.cache.buffer import GrowingRows, half_of
from compress.cache.layer import CacheConfig, PackedLayer
from compress.errors import CompressError
from compress.kernels.affine_groups import EIGHT_BITS
from compress.kernels.rounding import Grid, as_bytes, to_grid

_LARGEST = torch.finfo(EIGHT_BITS).max
_TABLE = torch.arange(256, dtype=torch.uint8).view(EIGHT_BITS).float()


class Config(CacheConfig):
    bits: Literal[8] = Field(8, description="bits of a code")


class Layer(PackedLayer):
    """One attention layer: codes and scales of the keys, codes and scales of the values."""

    config: Config

    def __init__(self, config: Config, key_basis: Tensor | None = None, value_basis: Tensor | None = None) -> None:
        if key_basis is not None or value_basis is not None:
            raise CompressError("KV cache: fp8 takes no bases; per_token does")
        super().__init__(config)
        self._buffers: list[GrowingRows] = []

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        for states in (key_states, value_states):
            batch, heads, _, width = states.shape
            for row, dtype in ((width, torch.uint8), (1, half_of(states))):
                self._buffers.append(GrowingRows(batch, heads, row, dtype, states.device, self.config.capacity))

    def buffers(self) -> list[GrowingRows]:
        return self._buffers

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        self._buffers[0].require_fit(key_states)
        for states, codes, scales in zip((key_states, value_states), *self._sides(), strict=True):
            largest = states.float().abs().amax(dim=-1, keepdim=True)
            scale = to_grid(largest / _LARGEST, Grid(scales.data.dtype), outward=1)
            step = scale.float()
            ratio = (states.float() / torch.where(step > 0, step, 1)).clamp(-_LARGEST, _LARGEST)
            codes.append(as_bytes(ratio.to(EIGHT_BITS)))
            scales.append(scale)

    def _sides(self) -> tuple[list[GrowingRows], list[GrowingRows]]:
        """Codes of both sides, scales of both sides."""
        return self._buffers[::2], self._buffers[1::2]

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = (
            (_numbers(codes.rows()) * scales.rows().float()).to(self.dtype)
            for codes, scales in zip(*self._sides(), strict=True)
        )
        return keys, values

    def truncate(self, length: int) -> None:
        for rows in self._buffers:
            rows.crop(length)

    def release(self) -> None:
        self._buffers = []

    def numel(self) -> int:
        return sum(codes.rows().numel() for codes in self._sides()[0])

    def packed_size(self) -> tuple[int, int]:
        return self.nbytes, self.numel()


def _numbers(codes: Tensor) -> Tensor:
    """fp32 of e4m3 bytes; on a CPU a table of all 256 is three times as fast as torch's cast."""
    if codes.device.type != "cpu":
        return codes.view(EIGHT_BITS).float()
    return _TABLE.index_select(0, codes.flatten().int()).view(codes.shape)
