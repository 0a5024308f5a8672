"""Keys and values that nobody has read yet: what a packed layer returns for a decode step, of one new token or a few.

`Cache.update` must return tensors, and attention comes later, out of the model's hands. An `Unread` is a tensor of the right
shape without data. The attention function that stands in front of the model's own (`compress.cache.queries`) knows it and
reads the packed bytes themselves (`attend`); whatever else touches it, a model that does something with its keys in between,
gets them multiplied out at that moment, as always.

    scores of sinks and window | scores of packed groups        softmax        the same two parts of the values

Cost: `compress.kernels.group_attention`; nothing of the cache's size is written but the scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from compress.cache.groups import GroupStore
from compress.kernels.group_attention import attention


class Unread(Tensor):
    """The keys (side 0) or values (side 1) of a layer, `[batch, heads, tokens, width]`."""

    @staticmethod
    def __new__(cls, layer: Any, side: int, dtype: torch.dtype, once: dict[str, Any]) -> Unread:
        shape = (layer.shape["batch"], layer.shape["heads"], layer.length, layer.shape[("head_dim", "value_dim")[side]])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=layer.device)

    def __init__(self, layer: Any, side: int, dtype: torch.dtype, once: dict[str, Any]) -> None:
        self.layer, self.side, self.version, self.once = layer, side, layer.version, once

    def read(self) -> Tensor:
        """The states themselves; RuntimeError when the cache has changed since."""
        if not self.once:
            if self.layer.version != self.version:
                raise RuntimeError("keys and values must be read, or cloned, before the cache goes on")
            self.once["states"] = self.layer.dense()
        return self.once["states"][self.side]

    @classmethod
    def of(cls, layer: Any, value_dtype: torch.dtype) -> tuple[Unread, Unread]:
        """Both sides; reading one of them reads the other."""
        once: dict[str, Any] = {}
        return cls(layer, 0, layer.dtype, once), cls(layer, 1, value_dtype, once)

    def __repr__(self) -> str:
        return f"Unread({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = tree_map_only(Unread, Unread.read, (args, kwargs or {}))
        return func(*read[0], **read[1])


def attend(stores: list[GroupStore], query: Tensor, scaling: float) -> Tensor:
    """The output of attention, `[batch, new tokens, heads, value width]`, for the newest tokens, none of them packed yet.

    Args:
        stores: together all rows of the batch; a new token reads every token that they hold but the new ones behind it.
        query: `[batch, query heads, new tokens, head_dim]`.
    """
    heads, new = stores[0].exact_keys.data.shape[1], query.shape[2]
    queries = query.unflatten(1, (heads, -1)).flatten(2, 3)  # those of a KV head follow each other, and of a head its tokens
    if len(stores) == 1:
        out = _attend(stores[0], queries, new, scaling)
    else:
        out = queries.new_empty(*queries.shape[:3], stores[0].value_dim)
        for store in stores:
            out[store.rows] = _attend(store, queries[store.rows], new, scaling)
    return out.unflatten(2, (-1, new)).flatten(1, 2).transpose(1, 2).contiguous()


def _attend(store: GroupStore, queries: Tensor, new: int, scaling: float) -> Tensor:
    """`[rows, heads, queries of a head, value width]`."""
    exact = store.exact_keys.rows(), store.exact_values.rows()
    return attention(queries, exact, store.packed_keys(), store.packed_values(), new, scaling)
