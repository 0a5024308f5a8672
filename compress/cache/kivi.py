"""Keys quantized per channel in groups of tokens, values per token: KIVI.

Paper: KIVI, arXiv:2402.02750. A few channels of the keys are large in every token, so keys share a scale along tokens, in
groups of `group_size`; values have no such channels and share one along `value_group_size` channels of a token. The first
`sink_tokens` and the newest `window` to `window + group_size - 1` tokens stay as they came: the oldest whole group leaves
the window when at least `window` tokens stay behind.

Where we differ: groups are counted from the first token behind the sinks and a group is rounded once, so a prompt in one
pass, in chunks or token by token gives the same bytes; the published window empties when it is full, this one never does.
A crop into a rounded group keeps the whole groups and takes the rest of that group back into the window as it reads.
Layout: one row per group, the codes `[group_size, head_dim]` packed token after token; one row of 2 head_dim scales and
minima. Bits per element: b + 32 / group_size, plus the window.
Cost: O(new tokens) amortised to write; reading multiplies out the whole cache of one layer.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compress.cache.buffer import GrowingRows
from compress.cache.compensation import quantize_groups
from compress.cache.layer import CacheConfig, PackedLayer
from compress.cache.quantizer import Part, decode, dequantize, encode
from compress.errors import CompressError
from compress.kernels.pack import pack, packed_width, unpack


class Config(CacheConfig):
    bits: int = Field(2, ge=2, le=8, description="bits of a code")
    key_bits: int | None = Field(None, ge=2, le=8, description="bits of keys where they differ from `bits`")
    value_bits: int | None = Field(None, ge=2, le=8, description="bits of values where they differ from `bits`")
    group_size: int = Field(32, ge=8, description="tokens that share a scale in every channel of the keys")
    value_group_size: int = Field(32, ge=8, description="channels that share a scale in every token of the values")
    window: int = Field(32, ge=0, description="newest tokens kept as they came, at least")
    sink_tokens: int = Field(4, ge=0, description="tokens at the start kept as they came")
    exact_prefill: bool = Field(True, description="the call that fills an empty cache attends to its exact states")

    @field_validator("group_size", "value_group_size")
    @classmethod
    def _whole_bytes(cls, size: int) -> int:
        if size % 8:
            raise ValueError("expected a multiple of 8, so that codes fill bytes")
        return size


class Layer(PackedLayer):
    """One attention layer."""

    config: Config
    reads_in_one_pass = False  # a token meets its neighbours exact, and rounded only once they are old

    def __init__(self, config: Config, key_basis: Tensor | None = None, value_basis: Tensor | None = None) -> None:
        if key_basis is not None or value_basis is not None:
            raise CompressError("KV cache: kivi and squat take no bases; their keys are rounded channel by channel")
        super().__init__(config)
        self.key_bits, self.value_bits = config.key_bits or config.bits, config.value_bits or config.bits
        self._buffers: list[GrowingRows] = []

    # Exact rows hold the sinks and then the window; what is packed lies between them.
    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, self.head_dim = key_states.shape
        self.value_dim = value_states.shape[-1]
        size = self.config.value_group_size
        if self.value_dim % size and self.value_dim > size:
            raise CompressError(f"value_group_size {size} does not divide the head_dim of {self.value_dim}")
        size = min(size, self.value_dim)
        step = packed_width(size, self.value_bits)
        self.value_parts = [
            Part(index * size, (index + 1) * size, self.value_bits, index * step, (index + 1) * step)
            for index in range(self.value_dim // size)
        ]
        half = key_states.dtype if key_states.dtype.itemsize == 2 else torch.bfloat16
        groups = max(0, self.config.capacity - self.config.sink_tokens) // self.config.group_size
        key_bytes = packed_width(self.config.group_size * self.head_dim, self.key_bits)

        def rows(width: int, dtype: torch.dtype, capacity: int) -> GrowingRows:
            return GrowingRows(batch, heads, width, dtype, key_states.device, capacity)

        exact = self.config.sink_tokens + self.config.window + self.config.group_size
        self.exact_keys, self.exact_values = (
            rows(states.shape[-1], states.dtype, exact) for states in (key_states, value_states)
        )
        self.key_codes, self.key_affine = rows(key_bytes, torch.uint8, groups), rows(2 * self.head_dim, half, groups)
        packed_tokens = groups * self.config.group_size
        self.value_codes = rows(self.value_parts[-1].last_byte, torch.uint8, packed_tokens)
        self.value_affine = rows(2 * len(self.value_parts), half, packed_tokens)
        self._buffers = [
            self.exact_keys, self.exact_values, self.key_codes, self.key_affine, self.value_codes, self.value_affine,
        ]  # fmt: skip

    def buffers(self) -> list[GrowingRows]:
        return self._buffers

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        self.exact_keys.require_fit(key_states)
        self.exact_keys.append(key_states)
        self.exact_values.append(value_states)
        self.flush()

    def flush(self) -> None:
        """Pack the oldest whole groups of the window."""
        config = self.config
        groups = (self.exact_keys.length - config.sink_tokens - config.window) // config.group_size
        if groups <= 0:
            return
        start, count = config.sink_tokens, groups * config.group_size
        keys = self.exact_keys.rows()[:, :, start : start + count].unflatten(2, (groups, config.group_size))
        codes, scale, minimum = self.round_keys(keys)
        self.key_codes.append(pack(codes.flatten(-2), self.key_bits))
        self.key_affine.append(torch.cat([scale, minimum], dim=-1))
        packed, affine = encode(
            self.exact_values.rows()[:, :, start : start + count], self.value_parts, self.value_affine.data.dtype
        )
        self.value_codes.append(packed)
        self.value_affine.append(affine)
        for rows in (self.exact_keys, self.exact_values):
            rows.remove(start, count)

    def round_keys(self, keys_BHNGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and minima of whole groups; see `quantize_groups`."""
        return quantize_groups(keys_BHNGD, self.key_bits, self.key_affine.data.dtype, self.head_dim, [])

    def read(self) -> tuple[Tensor, Tensor]:
        return self._joined(self.exact_keys, self.packed_keys()), self._joined(self.exact_values, self._packed_values())

    def packed_keys(self) -> Tensor:
        """Packed keys `[batch, heads, tokens, head_dim]` fp32."""
        size = self.config.group_size
        codes = unpack(self.key_codes.rows(), self.key_bits, size * self.head_dim).unflatten(-1, (size, self.head_dim))
        scale, minimum = self.key_affine.rows().unsqueeze(-2).chunk(2, dim=-1)
        return dequantize(codes, scale, minimum).flatten(2, 3)

    def _packed_values(self) -> Tensor:
        return decode(self.value_codes.rows(), self.value_affine.rows(), self.value_parts)

    def _joined(self, exact: GrowingRows, packed: Tensor) -> Tensor:
        if not packed.shape[2]:
            return exact.rows()
        sinks = self.config.sink_tokens
        rows = exact.rows()
        return torch.cat([rows[:, :, :sinks], packed.to(rows.dtype), rows[:, :, sinks:]], dim=2)

    def truncate(self, length: int) -> None:
        size, sinks = self.config.group_size, self.config.sink_tokens
        packed = self.key_codes.length * size
        if length >= sinks + packed:
            for rows in (self.exact_keys, self.exact_values):
                rows.crop(length - packed)
            return
        groups = max(0, length - sinks) // size
        rest = slice(groups * size, max(0, length - sinks))
        again = [self.packed_keys()[:, :, rest], self._packed_values()[:, :, rest]]
        for rows, states in zip((self.exact_keys, self.exact_values), again, strict=True):
            rows.crop(min(length, sinks))
            rows.append(states.to(rows.data.dtype))
        for rows in (self.key_codes, self.key_affine):
            rows.crop(groups)
        for rows in (self.value_codes, self.value_affine):
            rows.crop(groups * size)

    def release(self) -> None:
        self._buffers = []

    def numel(self) -> int:
        if not self._buffers:
            return 0
        batch, heads = self.exact_keys.data.shape[:2]
        return batch * heads * self.length * (self.head_dim + self.value_dim)
