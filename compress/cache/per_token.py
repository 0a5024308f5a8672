"""Keys and values quantized per token and head, the moment they come: the KV format of ResQ.

Paper: ResQ, arXiv:2412.14363. Each head of each token has its own scale and minimum (`compress.cache.quantizer`); with
`high_channels` the last channels of the head form a second part with more bits. Given an orthonormal basis U whose last
columns span what varies most, the large directions land in that part and the codes are those of k U.

Where we differ: the paper rotates keys and queries and lets attention run in the basis; here keys leave the cache rotated
back, k = codes U^T, so the model is not touched and any attention function works. A query kernel may still work in the
basis: q . (codes U^T) = (q U) . codes. Keys arrive after RoPE, where U belongs. Values may be rotated the same way, or
for nothing by folding U into v_proj and o_proj and passing no basis. The official code keeps an integer zero point and
forces 0 into every range; the minimum here is a float.

`sink_tokens` positions at the start stay as they came: the first token of most models draws most attention and has
outliers of its own. Positions are counted in the padded batch, so in a left-padded row they cover padding first.

The rotation of new tokens runs in fp64 (fp32 on MPS): a product of one token and of a thousand differ in the last bits
of fp32, and codes must not depend on how a text was cut. Reading back is fp32, in slices of `_CHUNK` tokens.
Cost per update: O(new tokens) to write, plus 2 T head_dim (4 T head_dim^2 with a basis) per head to read T tokens back.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.cache.buffer import GrowingRows, half_of
from compress.cache.layer import Bits, CacheConfig, PackedLayer
from compress.cache.quantizer import decode, encode, parts_of
from compress.errors import CompressError

_CHUNK = 1024  # tokens: bounds the transient fp32 copy
_ORTHONORMAL = 1e-2  # largest entry of |U^T U - I| that is still taken for rounding


class Config(CacheConfig):
    key_bits: Bits | None = Field(None, description="bits of keys where they differ from `bits`")
    value_bits: Bits | None = Field(None, description="bits of values where they differ from `bits`")
    high_bits: int = Field(8, ge=2, le=8, description="bits of the last `high_channels` of every head")
    high_channels: int = Field(0, ge=0, description="channels of a head with high_bits; ResQ: head_dim / 8")
    sink_tokens: int = Field(0, ge=0, description="tokens at the start kept as they came")


class Layer(PackedLayer):
    """One attention layer: a side of keys and a side of values."""

    config: Config

    def __init__(self, config: Config, key_basis: Tensor | None = None, value_basis: Tensor | None = None) -> None:
        super().__init__(config)
        self.key_side = Side(config, config.key_bits or config.bits, key_basis)
        self.value_side = Side(config, config.value_bits or config.bits, value_basis)
        self.sides = (self.key_side, self.value_side)

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        self.key_side.allocate(key_states)
        self.value_side.allocate(value_states)

    def buffers(self) -> list[GrowingRows]:
        return [buffer for side in self.sides for buffer in side.buffers]

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        self.key_side.append(key_states)
        self.value_side.append(value_states)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.key_side.read(), self.value_side.read()

    def truncate(self, length: int) -> None:
        for side in self.sides:
            side.truncate(length)

    def release(self) -> None:
        for side in self.sides:
            side.buffers = []

    def numel(self) -> int:
        return sum(side.numel() for side in self.sides)

    def packed_size(self) -> tuple[int, int]:
        packed = [side for side in self.sides if side.buffers]
        return (
            sum(side.codes.nbytes + side.affine.nbytes for side in packed),
            sum(side.codes.rows()[..., 0].numel() * side.head_dim for side in packed if side.kept is not None),
        )


class Side:
    """The keys or the values: `exact` rows for the first tokens, then `codes` and `affine` rows.

    With 16 bits every token is exact, the basis is not used, and reading gives the very tensors that came.
    """

    def __init__(self, config: Config, bits: int, basis: Tensor | None) -> None:
        self.bits, self.high_bits, self.high_channels = bits, config.high_bits, config.high_channels
        self.kept = None if bits == 16 else config.sink_tokens  # exact tokens; None: all
        self.capacity = config.capacity
        self.basis = None if bits == 16 or basis is None else _orthonormal(basis)
        self.buffers: list[GrowingRows] = []

    @property
    def exact(self) -> GrowingRows:
        return self.buffers[0]

    @property
    def codes(self) -> GrowingRows:
        return self.buffers[1]

    @property
    def affine(self) -> GrowingRows:
        return self.buffers[2]

    def allocate(self, states: Tensor) -> None:
        batch, heads, _, self.head_dim = states.shape
        if self.kept is None:
            self.parts = []
            exact_capacity, packed_capacity = self.capacity, 0
        else:
            if self.high_channels >= self.head_dim:
                raise CompressError(f"high_channels must be below the head_dim of {self.head_dim}, got {self.high_channels}")
            self.parts = parts_of(self.head_dim, self.bits, self.high_bits, self.high_channels)
            exact_capacity, packed_capacity = self.kept, max(0, self.capacity - self.kept)
        if self.basis is not None:
            if self.basis.shape not in ((self.head_dim, self.head_dim), (heads, self.head_dim, self.head_dim)):
                expected = f"[{self.head_dim}, {self.head_dim}] or [{heads}, {self.head_dim}, {self.head_dim}]"
                raise CompressError(f"a basis of this model's heads is {expected}, got {list(self.basis.shape)}")
            self.basis = self.basis.to(states.device)
        row_bytes = self.parts[-1].last_byte if self.parts else 0
        self.buffers = [
            GrowingRows(batch, heads, self.head_dim, states.dtype, states.device, exact_capacity),
            GrowingRows(batch, heads, row_bytes, torch.uint8, states.device, packed_capacity),
            GrowingRows(batch, heads, 2 * len(self.parts), half_of(states), states.device, packed_capacity),
        ]

    def append(self, states: Tensor) -> None:
        self.exact.require_fit(states)
        room = states.shape[2] if self.kept is None else self.kept - self.exact.length
        self.exact.append(states[:, :, :room])
        rest = states[:, :, room:]
        if not rest.shape[2]:
            return
        self.codes.reserve(rest.shape[2])
        self.affine.reserve(rest.shape[2])
        for chunk in rest.split(_CHUNK, dim=2):
            packed, affine = encode(_rotate(chunk, self.basis), self.parts, self.affine.data.dtype)
            self.codes.append(packed)
            self.affine.append(affine)

    def read(self) -> Tensor:
        exact = self.exact.rows()
        if not self.codes.length:
            return exact
        out = exact.new_empty(*exact.shape[:2], exact.shape[2] + self.codes.length, self.head_dim)
        out[:, :, : exact.shape[2]] = exact
        rest = out[:, :, exact.shape[2] :]
        if self.basis is None:
            decode(self.codes.rows(), self.affine.rows(), self.parts, rest)
            return out
        stored = zip(self.codes.rows().split(_CHUNK, dim=2), self.affine.rows().split(_CHUNK, dim=2), strict=True)
        for target, (codes, affine) in zip(rest.split(_CHUNK, dim=2), stored, strict=True):
            values = torch.empty(target.shape, dtype=torch.float32, device=target.device)
            decode(codes, affine, self.parts, values)
            target.copy_(values @ self.basis.mT)
        return out

    def truncate(self, length: int) -> None:
        exact = length if self.kept is None else min(length, self.kept)
        for buffer, rows in zip(self.buffers, (exact, length - exact, length - exact), strict=True):
            buffer.crop(rows)

    def numel(self) -> int:
        if not self.buffers:
            return 0
        batch, heads, _, width = self.exact.data.shape
        return batch * heads * width * (self.exact.length + self.codes.length)


def _rotate(states: Tensor, basis: Tensor | None) -> Tensor:
    """states @ U, rounded once."""
    if basis is None:
        return states
    wide = torch.float32 if states.device.type == "mps" else torch.float64
    return (states.to(wide) @ basis.to(wide)).float()


def _orthonormal(basis: Tensor) -> Tensor:
    """The basis in fp32, if it is one."""
    if basis.ndim not in (2, 3) or basis.shape[-1] != basis.shape[-2]:
        raise CompressError(f"a basis is [head_dim, head_dim] or [kv_heads, head_dim, head_dim], got {list(basis.shape)}")
    basis = basis.detach().float()
    gap = (basis.mT @ basis - torch.eye(basis.shape[-1], device=basis.device)).abs().max()
    if not gap <= _ORTHONORMAL:
        raise CompressError(f"a basis must be orthonormal; U^T U differs from the identity by up to {gap:.2g}")
    return basis
