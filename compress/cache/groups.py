"""Keys rounded per channel in groups of tokens, values per token, for rows of a batch that are padded at the same places.

Padding is not stored at all: a store counts real tokens, and `gaps` says where the others lie. So a row of a padded batch
has the sinks, the groups and the bytes that it would have alone, after one turn and after several.

    exact_keys, exact_values     the sinks, then the window
    key_codes                    one row per group, `[group_size, head_dim]` codes packed token after token
    key_affine                   one row per group, head_dim scales and head_dim minima, of the keys less the centre
    value_codes, value_affine    one row per token, a scale and a minimum for every `value_group_size` channels
    reference                    one row: the centre (mean key of the first group), the units of 8-bit scales and minima,
                                 and whether the wave of the key bias is taken off first (`compress.cache.wave`)

Centre and units come from the first group alone, however many are rounded at once, so bytes do not depend on how a text
was cut. A centre is worth it where a channel lies far from 0 (the key biases of Qwen2): a minimum in few bits would be wrong
by many steps. Units leave room of 28 times the first group's largest scale and minimum.
"""

from __future__ import annotations

import copy
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from compress.cache.buffer import GrowingRows, half_of
from compress.cache.wave import Wave
from compress.kernels.affine_groups import EIGHT_BITS, expand_groups
from compress.kernels.group_packing import pack_groups
from compress.kernels.pack import packed_width

_CALMER = 0.5  # a wave that leaves more of the keys' variance than this is not theirs
_ANY = 1 << 30  # tokens
_SLICE = 1024  # tokens: bounds fp32 transients
_ONE = 1 / 16  # of the first group's largest scale or minimum is 1.0 in eight bits, whose end is 448


class GroupStore:
    """The tokens of some rows `[batch, heads, tokens, head_dim]`; `rows` are their places in the batch, ascending."""

    known: tuple[str, ...] = ("gaps", "waiting")  # beside the tensors, for a saved store

    wave: Wave | None = None  # of the layer's key bias

    def __init__(self, config: Any, rows: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        self.config, self.rows = config, rows
        self.gaps: list[list[int]] = []  # [start, count] of every run of padding, in order
        self.waiting = False  # for the queries of the tokens that came last, before anything is packed
        batch, heads, _, self.head_dim = key_states.shape
        self.value_dim = value_states.shape[-1]
        self.key_bits, self.value_bits = config.key_bits or min(8, config.bits + 1), config.value_bits or min(8, config.bits)
        fitting = [size for size in range(8, config.value_group_size + 1, 8) if self.value_dim % size == 0]
        self.value_group = fitting[-1] if fitting else self.value_dim  # head_dim 80: 16 channels
        self.affine_dtype = EIGHT_BITS if config.affine_bits == 8 else half_of(key_states)
        affine = torch.uint8 if config.affine_bits == 8 else self.affine_dtype
        groups = max(0, config.capacity - config.sink_tokens) // config.group_size

        def new(width: int, dtype: torch.dtype, capacity: int) -> GrowingRows:
            return GrowingRows(batch, heads, width, dtype, key_states.device, capacity)

        exact = config.sink_tokens + config.window + config.group_size
        self.exact_keys = new(self.head_dim, key_states.dtype, exact)
        self.exact_values = new(self.value_dim, value_states.dtype, exact)
        self.key_codes = new(packed_width(config.group_size * self.head_dim, self.key_bits), torch.uint8, groups)
        self.key_affine = new(2 * self.head_dim, affine, groups)
        tokens = groups * config.group_size
        self.value_codes = new(packed_width(self.value_dim, self.value_bits), torch.uint8, tokens)
        self.value_affine = new(2 * self.value_dim // self.value_group, affine, tokens)
        self.reference = new(self.head_dim + 5, torch.float32, 1)

    def buffers(self) -> list[GrowingRows]:
        """Everything that is stored."""
        return [
            self.exact_keys, self.exact_values, self.key_codes, self.key_affine, self.value_codes, self.value_affine,
            self.reference,
        ]  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens of a row, padding not counted."""
        return self.exact_keys.length + self.key_codes.length * self.config.group_size

    @property
    def padding(self) -> int:
        """Tokens that are not stored."""
        return sum(count for _, count in self.gaps)

    def curious(self, new: int) -> bool:
        """Whether the attention of `new` tokens can tell this store something; before they are appended.

        Padding comes with a turn, so in front of a row's first token or among several. One that comes alone, as from
        `generate` for a row that has ended, is stored: asking for the mask at every step would wait for the GPU each time.
        """
        return new > 1 or not self.tokens

    def observe(self, queries: Tensor) -> None:
        """Queries `[batch, heads, queries of a KV head, tokens, head_dim]` fp32 of the newest tokens, 0 for padding."""

    def alike(self) -> int:
        """How many tokens may come at once so that each is answered as if they came one by one: none that packs a group,
        but the next if that one does."""
        if self.config.bits == 16:
            return _ANY
        behind = self.exact_keys.length - self.config.sink_tokens - self.config.window
        return max(1, self.config.group_size - 1 - behind)

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        self.exact_keys.append(key_states)
        self.exact_values.append(value_states)

    def drop_padding(self, newest: list[bool]) -> None:
        """Forget those of the newest tokens that nobody may read; the places of all of them, true for a real one."""
        start = self.tokens + self.padding - len(newest)
        first = self.exact_keys.length - len(newest)
        for real, run in groupby(enumerate(newest), key=itemgetter(1)):
            places = [place for place, _ in run]
            if real:
                first += len(places)
                continue
            for rows in (self.exact_keys, self.exact_values):
                rows.remove(first, len(places))
            if self.gaps and sum(self.gaps[-1]) == start + places[0]:
                self.gaps[-1][1] += len(places)
            else:
                self.gaps.append([start + places[0], len(places)])

    def places(self) -> list[slice]:
        """Where in a row its tokens lie, in runs between the padding."""
        edges = [0, *(edge for start, count in self.gaps for edge in (start, start + count)), self.tokens + self.padding]
        return [slice(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if last > first]

    def flush(self) -> None:
        """Pack the oldest whole groups of the window."""
        config = self.config
        if config.bits == 16:
            return
        groups = (self.exact_keys.length - config.sink_tokens - config.window) // config.group_size
        if groups <= 0:
            return
        start, count = config.sink_tokens, groups * config.group_size
        for rows, new in (
            (self.key_codes, groups),
            (self.key_affine, groups),
            (self.value_codes, count),
            (self.value_affine, count),
        ):
            rows.reserve(new)
        step = config.group_size * max(1, _SLICE // config.group_size)
        for first in range(start, start + count, step):
            last = min(first + step, start + count)
            self._pack(*(rows.rows()[:, :, first:last] for rows in (self.exact_keys, self.exact_values)))
        for rows in (self.exact_keys, self.exact_values):
            rows.remove(start, count)

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        """Append whole groups, `[batch, heads, tokens, head_dim]`."""
        size, first = self.config.group_size, self.config.sink_tokens + self.value_codes.length
        if not self.reference.length:
            self._refer(keys[:, :, :size].float(), values[:, :, :size].float().unflatten(-1, (-1, self.value_group)))
        if (wave := self._wave(first, keys.shape[2])) is not None:
            keys = keys.float() - wave
        units, centre = self._units("keys"), self._centre().squeeze(2)
        packed_keys = pack_groups(
            keys, self.key_bits, size, self.head_dim, self.affine_dtype, units, centre, *self.compensation(), self.config.fit
        )
        runs, units = self.value_dim // self.value_group, self._units("values")
        packed_values = pack_groups(values, self.value_bits, 1, runs, self.affine_dtype, units)
        stored = self.key_codes, self.key_affine, self.value_codes, self.value_affine
        for rows, new in zip(stored, (*packed_keys, *packed_values), strict=True):
            rows.append(new)

    def _refer(self, keys: Tensor, values: Tensor) -> None:
        """Centre `[head_dim]`, units of the keys' scale and minimum, units of the values', and 1 where the wave is used."""
        used = keys.new_zeros(*keys.shape[:2], 1, 1)
        if self.wave is not None:
            sinks = self.config.sink_tokens
            wave = self.wave.at(sinks, sinks + keys.shape[2], keys.device)
            spread = [states.var(dim=2).sum(dim=-1)[..., None, None] for states in (keys, keys - wave)]
            used = (spread[1] < _CALMER * spread[0]).float()
            keys = keys - used * wave
        centre = keys.mean(dim=2, keepdim=True).to(self.exact_keys.data.dtype).float()
        units = []
        for groups, bits in (((keys - centre).mT, self.key_bits), (values, self.value_bits)):
            low, high = groups.amin(dim=-1), groups.amax(dim=-1)
            for largest in ((high - low) / ((1 << bits) - 1), low.abs()):
                largest = _ONE * largest.flatten(2).amax(dim=2)[..., None, None]
                units.append(torch.where(largest > 0, largest, 1))
        self.reference.append(torch.cat([centre, *units, used], dim=-1))

    def _wave(self, start: int, count: int) -> Tensor | None:
        """The key bias at the tokens from `start` on, `[batch, heads, count, head_dim]`; None where no row uses it."""
        if not self._uses_wave():
            return None
        used = self.reference.rows()[..., -1:]
        return used * self.wave.at(start, start + count, used.device)

    def _uses_wave(self) -> bool:
        return self.wave is not None and bool(self.reference.rows()[..., -1].any())

    def _centre(self) -> Tensor:
        return self.reference.rows()[..., : self.head_dim]

    def _units(self, side: str) -> Tensor | None:
        """What 1.0 stands for in scales and minima `[batch, heads, 2]`; None where they have 16 bits."""
        if self.affine_dtype != EIGHT_BITS:
            return None
        first = self.head_dim + (0 if side == "keys" else 2)
        return self.reference.rows()[:, :, 0, first : first + 2]

    def compensation(self) -> tuple[Tensor | None, Tensor | None, int]:
        """Order, corrections and block of the channels of keys, as `pack_groups` takes them: none here."""
        return None, None, 0

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values in the dtypes they came in."""
        if not self.key_codes.length:
            exact = self.exact_keys.rows(), self.exact_values.rows()
            return tuple(rows.clone() for rows in exact) if self.waiting else exact  # packed before attention reads them
        sinks = self.config.sink_tokens
        packed, whole = self.value_codes.length, []
        for exact, expand in ((self.exact_keys.rows(), self._expand_keys), (self.exact_values.rows(), self._expand_values)):
            states = exact.new_empty(*exact.shape[:2], exact.shape[2] + packed, exact.shape[3])
            states[:, :, :sinks], states[:, :, sinks + packed :] = exact[:, :, :sinks], exact[:, :, sinks:]
            expand(states[:, :, sinks : sinks + packed])
            whole.append(states)
        return whole[0], whole[1]

    @property
    def attends(self) -> bool:
        """Whether attention may run on the packed groups: something is packed, and nothing is added to keys behind them."""
        return self.key_codes.length > 0 and not self._uses_wave()

    def packed_keys(self) -> tuple[Any, ...]:
        """Codes, scales and minima, bits, runs, units and centre, as `group_scores` takes them."""
        centre = self._centre().squeeze(2)
        return self.key_codes.rows(), self.key_affine.rows(), self.key_bits, self.head_dim, self._units("keys"), centre

    def packed_values(self) -> tuple[Any, ...]:
        """The same without a centre, as `group_sums` takes them, with their width before the units."""
        runs = self.value_dim // self.value_group
        stored = self.value_codes.rows(), self.value_affine.rows()
        return *stored, self.value_bits, runs, self.value_dim, self._units("values")

    def _expand_keys(self, out: Tensor) -> None:
        codes, affine, bits, width, units, centre = self.packed_keys()
        size = self.config.group_size
        if not self._uses_wave():
            expand_groups(codes, affine, bits, width, out, units, centre)
            return
        step = max(1, _SLICE // size)
        for first in range(0, codes.shape[2], step):
            groups, part = slice(first, first + step), out[:, :, first * size : (first + step) * size]
            # in fp32: the wave is added before they are rounded
            keys = torch.empty(part.shape, dtype=torch.float32, device=part.device)
            expand_groups(codes[:, :, groups], affine[:, :, groups], bits, width, keys, units, centre)
            part.copy_(keys + self._wave(self.config.sink_tokens + first * size, part.shape[2]))

    def _expand_values(self, out: Tensor) -> None:
        codes, affine, bits, runs, _, units = self.packed_values()
        expand_groups(codes, affine, bits, runs, out, units)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; of a cut group the kept ones go back to the window as they read."""
        self.gaps = [[start, min(count, length - start)] for start, count in self.gaps if start < length]
        length -= self.padding
        size, sinks = self.config.group_size, self.config.sink_tokens
        packed = self.key_codes.length * size
        if length >= sinks + packed:
            for rows in (self.exact_keys, self.exact_values):
                rows.crop(length - packed)
            return
        groups = max(0, length - sinks) // size
        rest = slice(groups * size, max(0, length - sinks))
        again = [states[:, :, sinks : sinks + packed][:, :, rest].clone() for states in self.read()]
        for rows, states in zip((self.exact_keys, self.exact_values), again, strict=True):
            rows.crop(min(length, sinks))
            rows.append(states.to(rows.data.dtype))
        for rows, kept in (
            (self.key_codes, groups), (self.key_affine, groups),
            (self.value_codes, groups * size), (self.value_affine, groups * size),
        ):  # fmt: skip
            rows.crop(kept)
        if not groups:
            self.reference.crop(0)  # the next first group decides anew

    def fork(self) -> GroupStore:
        """The same store; what `select` does to one does not change the other."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, GrowingRows):
                setattr(twin, name, copy.copy(value))
        twin.gaps = [list(gap) for gap in self.gaps]
        return twin

    def select(self, indices: Tensor) -> None:
        """Rows in the order of `indices`, which count within this store."""
        for buffer in self.buffers():
            buffer.select(indices)

    def repeat(self, repeats: int) -> None:
        """Every row `repeats` times in a row."""
        self.rows = (self.rows[:, None] * repeats + torch.arange(repeats, device="cpu")).flatten()
        for buffer in self.buffers():
            buffer.repeat(repeats)

    def numel(self) -> int:
        """Values in the keys and values that are stored."""
        batch, heads = self.exact_keys.data.shape[:2]
        return batch * heads * self.tokens * (self.head_dim + self.value_dim)

    def packed_size(self) -> tuple[int, int]:
        """Bytes of codes, scales and minima, and how many values they stand for."""
        batch, heads = self.exact_keys.data.shape[:2]
        packed = (self.key_codes, self.key_affine, self.value_codes, self.value_affine)
        count = batch * heads * self.value_codes.length * (self.head_dim + self.value_dim)
        return sum(rows.nbytes for rows in packed), count
