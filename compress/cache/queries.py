"""Queries and masks for a cache: an attention function that shows them and then does what the model's own does.

Transformers hands keys and values to a cache's `update` and queries to the attention function right after it, both in one
thread. So the layer that was updated last is the one that the queries belong to, if the attention is of its place in the
model and over as many keys; a cache that was filled by hand must not learn from whatever attends next.

Only `sdpa` and `eager` are stood in front of: transformers looks for "flash" in the names of attention functions and loads
hub kernels by name, and the masks of others are of another kind. With those a cache sees neither queries nor padding.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from compress.attention import look_before

_PREFIX = "compress_queries_"
_SHOWN = ("sdpa", "eager")
_last = threading.local()


def expect_queries(layer: Any) -> None:
    """The next attention of this thread, if it fits, belongs to `layer`, whose `see(query, valid)` is called."""
    _last.layer = layer


def show_queries(model: nn.Module) -> bool:
    """Give a model the attention function that shows queries, which stays; false where its own is not stood in front of."""
    own = model.config._attn_implementation
    if own in _SHOWN:
        look_before(model, _PREFIX + own, _show)
    return own in _SHOWN or own.startswith(_PREFIX)


def _show(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    layer, _last.layer = getattr(_last, "layer", None), None
    if layer is None or key.shape[2] != layer.length or getattr(module, "layer_idx", layer.index) != layer.index:
        return
    if key.shape[:2] == (layer.shape["batch"], layer.shape["heads"]):
        layer.see(query, _valid(mask, key.shape[2]))


def _valid(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which of the cache's tokens are no padding: those that the last query of the row may read, `[batch, tokens]`."""
    if mask is None:
        return None
    last = mask[:, 0, -1, :tokens] if mask.ndim == 4 else mask[:, -tokens:]
    return (
        last
        if last.dtype == torch.bool
        else last > torch.finfo(last.dtype).min / 2
        if last.is_floating_point()
        else last > 0
    )
