"""Queries and masks for a cache: an attention function that shows them and then does what the model's own does, or attends
to packed bytes in its place (`compress.cache.unread`).

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
from compress.cache.unread import Unread

_PREFIX = "compress_queries_"
_SHOWN = ("sdpa", "eager")
_STRANGE = ("softcap", "s_aux", "sliding_window")
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


def _show(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None] | None:
    if isinstance(key, Unread):
        return _answer(module, query, key, mask, options)
    layer, _last.layer = getattr(_last, "layer", None), None
    if layer is None or key.shape[2] != layer.length or getattr(module, "layer_idx", layer.index) != layer.index:
        return
    if key.shape[:2] == (layer.shape["batch"], layer.shape["heads"]):
        layer.see(query, _valid(mask, key.shape[2]))
    return None


def _answer(
    module: nn.Module, query: Tensor, key: Unread, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, None] | None:
    """Attention on the packed bytes, where it is plain: no cap, no sink logits, no weights asked for, no gradients."""
    strange = any(options.get(name) is not None for name in _STRANGE) or options.get("dropout") or query.requires_grad
    if strange or query.shape[2] != 1 or module.config._attn_implementation != _PREFIX + "sdpa":
        return None
    valid = _valid(mask, key.shape[2])
    if (
        valid is not None
        and mask.is_floating_point()
        and mask[..., : key.shape[2]].masked_select(valid[:, None, None]).any()
    ):
        return None  # biases
    out = key.layer.attend(query, valid, options.get("scaling") or query.shape[-1] ** -0.5)
    return None if out is None else (out, None)


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
