"""What transformers asks of one layer of a cache, written once for every packed layer.

A packed layer is a list of `GrowingRows` plus three functions: append new states, read all of them back, forget the end.
Everything else of the contract (transformers 5.23, `CacheLayerMixin` and `DynamicLayer`) follows from those: beam search
and batch changes act on the batch dimension of every buffer, offloading moves every buffer, `crop` cuts tokens.

`update` returns the whole cache, read back: also the tokens of the call itself are seen as they are stored, so that a prompt
in one pass, in chunks or token by token meets the same keys and values. `exact_prefill` makes the one exception that most
published numbers are measured with: the call that fills an empty cache attends to its own exact states.

`keys` and `values` stay None; there are no dense tensors to show. `update` records no gradients. The first update fixes
batch, heads, head_dim and device; `reset` frees everything.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.utils import ALL_CACHE_NAMES

from compress.cache.buffer import GrowingRows

# What models and generate call the argument: renamed by transformers 5.24, where the old name still works from outside.
CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


def _packable(bits: int) -> int:
    if bits != 16 and not 2 <= bits <= 8:
        raise ValueError("expected 2 to 8, or 16 to keep the states as they came")
    return bits


Bits = Annotated[int, AfterValidator(_packable)]


class CacheConfig(BaseModel):
    """Options that every method has; frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits = Field(4, description="bits of a code, 2 to 8; 16 keeps the states as they came")
    exact_prefill: bool = Field(False, description="the call that fills an empty cache attends to its exact states")
    capacity: int = Field(0, ge=0, description="tokens to allocate at once; buffers double beyond it")


class PackedLayer(CacheLayerMixin):
    """Subclasses define `allocate`, `buffers`, `append`, `read`, `truncate`, `release`, `numel` and `packed_size`."""

    takes_metric = False  # of the queries, as a constructor argument
    watched = False  # an attention function will show queries and mask of the calls that ask for it
    index = 0  # of the layer in the model
    reads_in_one_pass = True  # one forward pass sees what token-by-token decoding sees
    is_sliding = False
    is_croppable = True
    is_compileable = False  # buffers grow

    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.config = config
        self.length = 0
        self.away = False  # offloaded
        self.shape: dict[str, int] = {}  # batch, heads, head_dim and value_dim of the states it holds

    @abstractmethod
    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers for states like these, of which there may be 0 tokens."""

    @abstractmethod
    def buffers(self) -> list[GrowingRows]:
        """Everything that is stored; an empty list before `allocate`."""

    @abstractmethod
    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store new tokens `[batch, heads, new, head_dim]`."""

    @abstractmethod
    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values, in the dtypes they came in."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""

    @abstractmethod
    def release(self) -> None:
        """Drop the buffers."""

    @abstractmethod
    def packed_size(self) -> tuple[int, int]:
        """Bytes of codes, scales and minima, and how many values they stand for."""

    def alike(self) -> int:
        """How many tokens may come in one call so that each is answered as if they came one by one."""
        return 1

    @abstractmethod
    def numel(self) -> int:
        """Values in the keys and values that are stored."""

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        self.shape = {"batch": batch, "heads": heads, "head_dim": width, "value_dim": value_states.shape[-1]}
        self.allocate(key_states, value_states)
        self.is_initialized = True

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        fills_empty = self.length == 0
        self.append(key_states, value_states)
        self.length += key_states.shape[-2]
        return (key_states, value_states) if fills_empty and self.config.exact_prefill else self.read()

    def facts(self) -> dict[str, Any]:
        """What `rebuild` must know beside the tensors, as JSON; empty for an empty layer."""
        if not self.is_initialized:
            return {}
        return {"length": self.length, "dtype": str(self.dtype).removeprefix("torch."), **self.shape}

    def rebuild(self, facts: dict[str, Any], tensors: list[Tensor], device: torch.device | str) -> None:
        """Fill an empty layer with the rows of its buffers and the facts of the layer that they come from."""
        dtype, sides = getattr(torch, facts["dtype"]), (facts["head_dim"], facts["value_dim"])
        states = [torch.empty(facts["batch"], facts["heads"], 0, width, dtype=dtype, device=device) for width in sides]
        self.lazy_initialization(*states)
        self.restore(facts)
        for buffer, rows in zip(self.buffers(), tensors, strict=True):
            buffer.data, buffer.length = rows, rows.shape[2]
        self.length = facts["length"]
        self.require_whole()

    @torch.inference_mode(mode=False)
    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        twin = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    def restore(self, facts: dict[str, Any]) -> None:
        """Make the buffers of a layer that has others than a new one; before they are filled."""

    def require_whole(self) -> None:
        """CompressError where a layer cannot go on from what was restored."""

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; as in `DynamicLayer`, the number is negative or 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number, got {tokens_to_remove}")
        if not tokens_to_remove or not self.is_initialized:
            return
        self.length = max(0, self.length + tokens_to_remove)
        if self.length:
            self.truncate(self.length)
        else:
            self.reset()

    def reset(self) -> None:
        """Free everything; the next update may have another batch size, dtype or device."""
        self.length = 0
        self.is_initialized = False
        self.release()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        for buffer in self.buffers():
            buffer.select(indices)
        self._count_rows()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def batch_repeat_interleave(self, repeats: int) -> None:
        for buffer in self.buffers():
            buffer.repeat(repeats)
        self._count_rows()

    def _count_rows(self) -> None:
        if self.is_initialized:
            self.shape["batch"] = self.buffers()[0].data.shape[0]

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _move(self, device: torch.device | str) -> None:
        for buffer in self.buffers():
            buffer.to(device)

    def offload(self) -> None:
        """Move the packed bytes, not dense states, to the CPU."""
        self._move("cpu")
        self.away = True

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)
        self.away = False

    @property
    def nbytes(self) -> int:
        """Bytes in use: codes, scales, minima, exact states."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def reserved_nbytes(self) -> int:
        """Bytes allocated for tokens to come."""
        return sum(buffer.reserved_nbytes for buffer in self.buffers())

    @property
    def bits_per_element(self) -> float:
        """Measured bits per stored key or value element, everything in use counted; 0 when empty."""
        return 8 * self.nbytes / self.numel() if self.numel() else 0.0

    def __repr__(self) -> str:
        name = type(self).__module__.rpartition(".")[2]
        return f"{name}(tokens={self.length}, bits_per_element={self.bits_per_element:.2f})"
