"""Keys quantized per channel in groups of tokens, values per token: KIVI.

Paper: KIVI, arXiv:2402.02750. A few channels of the keys are large in every token, so keys share a scale along tokens, in
groups of `group_size`; values have no such channels and share one along `value_group_size` channels of a token. The first
`sink_tokens` and the newest `window` to `window + group_size - 1` tokens stay as they came: the oldest whole group leaves
the window when at least `window` tokens stay behind.

Where we differ: groups are counted from the first token behind the sinks and a group is rounded once, so a prompt in one
pass, in chunks or token by token gives the same bytes; the published window empties when it is full, this one never does.
A crop into a rounded group keeps the whole groups and takes the rest of that group back into the window as it reads.
In a padded batch every row counts its own tokens, which the mask of the attention shows (`compress.cache.queries`); rows
with the same padding share a `GroupStore`, which has the layout. A cache that was made from a config sees no mask and takes
padding for tokens.
Bits per element: keys k + 2 affine_bits / group_size, values v + 2 affine_bits / value_group_size; plus the window.
Cost: O(new tokens) amortised to write; reading multiplies out the whole cache of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.cache.buffer import GrowingRows, require_same
from compress.cache.groups import GroupStore
from compress.cache.layer import Bits, CacheConfig, PackedLayer
from compress.cache.queries import expect_queries
from compress.cache.unread import Unread, attend
from compress.cache.wave import Wave
from compress.errors import CompressError
from compress.kernels.group_attention import in_place

_FEW = 8  # new tokens that attend to packed bytes: beyond, multiplying out once is cheaper than cutting codes out for each


class Config(CacheConfig):
    bits: Bits = Field(2, description="bits of a code, 2 to 8; 16 keeps the states as they came")
    key_bits: int | None = Field(None, ge=2, le=8, description="bits of keys; null: one more than `bits`, up to 8")
    value_bits: int | None = Field(None, ge=2, le=8, description="bits of values; null: `bits`")
    group_size: int = Field(64, ge=8, description="tokens that share a scale in every channel of the keys")
    value_group_size: int = Field(32, ge=8, description="channels that share a scale in every token of the values, at most")
    affine_bits: Literal[8, 16] = Field(8, description="bits of a scale and of a minimum")
    fit: int = Field(5, ge=0, le=64, description="shrunken ranges tried for every scale of the keys; 0: the extremes decide")
    window: int = Field(32, ge=0, description="newest tokens kept as they came, at least")
    sink_tokens: int = Field(4, ge=0, description="tokens at the start kept as they came")
    exact_prefill: bool = Field(True, description="the call that fills an empty cache attends to its exact states")

    @model_validator(mode="after")
    def _kept_whole(self) -> Config:
        if self.bits == 16 and (self.key_bits or self.value_bits):
            raise ValueError("bits: 16 keeps keys and values as they came; leave out key_bits and value_bits")
        return self

    @field_validator("group_size", "value_group_size")
    @classmethod
    def _whole_bytes(cls, size: int) -> int:
        if size % 8:
            raise ValueError("expected a multiple of 8, so that codes fill bytes")
        return size


class Layer(PackedLayer):
    """One attention layer: a store for every pattern of padding in the batch."""

    config: Config
    newest = 0  # tokens of the last call
    version = 0  # counts the changes
    stays = True  # where it is, between an update and its attention: an offloading cache sends it away
    reads_in_one_pass = False  # a token meets its neighbours exact, and rounded only once they are old

    def __init__(self, config: Config, key_basis: Tensor | None = None, value_basis: Tensor | None = None) -> None:
        if key_basis is not None or value_basis is not None:
            raise CompressError("KV cache: kivi and squat take no bases; their keys are rounded channel by channel")
        super().__init__(config)
        self.stores: list[GroupStore] = []
        self.wave: Wave | None = None

    def new_store(self, rows: Tensor, key_states: Tensor, value_states: Tensor) -> GroupStore:
        """An empty store for `rows` of the batch, with room for states like these."""
        return GroupStore(self.config, rows, key_states, value_states)

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        rows = torch.arange(key_states.shape[0], device="cpu")
        self.stores = [self.new_store(rows, key_states, value_states)]
        if self.wave is not None and self.wave.bias.shape == (key_states.shape[1], key_states.shape[3]):
            self.stores[0].wave = self.wave

    def buffers(self) -> list[GrowingRows]:
        return [buffer for store in self.stores for buffer in store.buffers()]

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        self.newest, self.version = key_states.shape[2], self.version + 1
        require_same(key_states, *(self.shape[key] for key in ("batch", "heads", "head_dim")))
        for store in self.stores:
            if store.waiting:  # the last call's queries never came
                store.flush()
            store.waiting = self.watched and store.curious(key_states.shape[2])
            whole = len(store.rows) == self.shape["batch"]
            store.append(*(states if whole else states[store.rows] for states in (key_states, value_states)))
            if not store.waiting:
                store.flush()
        if any(store.waiting for store in self.stores):
            expect_queries(self)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def see(self, query: Tensor, real: Tensor | None) -> None:
        """The queries `[batch, heads, new tokens, head_dim]` of the call that came last.

        `real` `[batch, new tokens]` is false for padding. Groups that waited for it are packed.
        """
        away = self.away  # an offloading cache sends a layer away before its attention runs
        if away:
            self.prefetch()
        queries = query.detach().float().unflatten(1, (self.shape["heads"], -1))  # those of a KV head follow each other
        if real is not None and not real.all():
            real = real.expand(self.shape["batch"], -1)
            self._leave_out(real.cpu())
            queries = queries * real[:, None, None, :, None].to(queries.device)
        self.version += 1  # whoever has not read by now gets no mixture of exact states and rounded ones
        for store in self.stores:
            if store.waiting:
                store.waiting = False
                store.observe(queries[store.rows])
                store.flush()
        if away:
            self.offload()

    def _leave_out(self, newest: Tensor) -> None:
        """Drop padding among the newest tokens; rows that are padded at other places get stores of their own.

        `newest` `[batch, new]` is true for real tokens.
        """
        stores = []
        for store in self.stores:
            patterns, kind = newest[store.rows].unique(dim=0, return_inverse=True)
            for index, pattern in enumerate(patterns.tolist() if store.waiting else []):
                part = store if len(patterns) == 1 else self._rows_of(store, torch.nonzero(kind == index).flatten())
                part.drop_padding(pattern)
                stores.append(part)
            if not store.waiting:
                stores.append(store)
        self.stores = stores

    def _rows_of(self, store: GroupStore, local: Tensor) -> GroupStore:
        """A copy of some rows of a store; `local` counts within it."""
        part = store.fork()
        part.rows = store.rows[local]
        part.select(local)
        return part

    def alike(self) -> int:
        """How many tokens may come in one call so that each is answered as if they came one by one."""
        return min(store.alike() for store in self.stores) if self.stores else 1

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values; those of a decode step are left `Unread`, for the attention function to do without."""
        known = in_place(self.device, self.dtype) and not torch.compiler.is_compiling()
        if known and self.stays and self.newest <= _FEW and self.watched and all(store.attends for store in self.stores):
            return Unread.of(self, self.stores[0].exact_values.data.dtype)
        return self.dense()

    def attend(self, query: Tensor, readable: Tensor | None, scaling: float) -> Tensor | None:
        """The output of attention on the packed bytes; None where a row may not read all that is stored of it.

        `readable`: `[batch, tokens]` on the CPU.
        """
        if readable is not None:
            readable = readable.expand(self.shape["batch"], -1)
            for store in self.stores:
                if not all(readable[store.rows][:, place].all() for place in store.places()):
                    return None
        return attend(self.stores, query, scaling)

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values in the dtypes they came in."""
        if len(self.stores) == 1 and not self.stores[0].gaps:
            return self.stores[0].read()
        whole: list[Tensor] = []
        for store in self.stores:
            for side, states in enumerate(store.read()):
                if len(whole) <= side:
                    length = store.padding + states.shape[2]
                    whole.append(states.new_zeros(self.shape["batch"], states.shape[1], length, states.shape[3]))
                places = store.places()
                for place, part in zip(places, states.split([p.stop - p.start for p in places], dim=2), strict=True):
                    whole[side][store.rows, :, place] = part
        return whole[0], whole[1]

    def truncate(self, length: int) -> None:
        self.version += 1
        for store in self.stores:
            store.truncate(length)

    def release(self) -> None:
        self.version += 1
        self.stores = []

    def numel(self) -> int:
        return sum(store.numel() for store in self.stores)

    def packed_size(self) -> tuple[int, int]:
        sizes = [store.packed_size() for store in self.stores]
        return sum(size for size, _ in sizes), sum(count for _, count in sizes)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        self.version += 1
        indices = torch.as_tensor(indices, device="cpu")
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        stores = []
        for store in self.stores:
            local = torch.full((self.shape["batch"],), -1, device="cpu")
            local = local.index_copy(0, store.rows, torch.arange(len(store.rows), device="cpu"))[indices]
            if (local >= 0).any():
                part = self._rows_of(store, local[local >= 0])
                part.rows = torch.nonzero(local >= 0).flatten()
                stores.append(part)
        self.stores, self.shape["batch"] = stores, len(indices)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def batch_repeat_interleave(self, repeats: int) -> None:
        self.version += 1
        for store in self.stores:
            store.repeat(repeats)
        if self.stores:
            self.shape["batch"] *= repeats

    def facts(self) -> dict[str, Any]:
        stores = [
            {"rows": store.rows.tolist(), **{name: getattr(store, name) for name in store.known}} for store in self.stores
        ]
        return super().facts() | ({"stores": stores} if stores else {})

    def restore(self, facts: dict[str, Any]) -> None:
        (empty,) = self.stores
        self.stores, self.version = [], self.version + 1
        for known in facts["stores"]:
            if strange := set(known) - {"rows", *empty.known}:
                raise CompressError(f"saved by another version of compress, which knew {', '.join(sorted(strange))}")
            store = self._rows_of(empty, torch.tensor(known.pop("rows"), device="cpu"))
            for name, value in known.items():
                setattr(store, name, value)
            self.stores.append(store)

    def require_whole(self) -> None:
        if self.wave is None and any((store.reference.rows()[..., -1] > 0).any() for store in self.stores):
            raise CompressError("saved with the model's key biases taken off; make the cache from the model, not its config")
