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
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from compress.attention import look_before
from compress.cache.unread import Unread

_PREFIX = "compress_queries_"
_SHOWN = ("sdpa", "eager")
_PLAIN = {"scaling", "is_causal", "position_ids", "cache_position", "use_cache"}  # change nothing here
_last = threading.local()


def expect_queries(layer: Any) -> None:
    """The next attention of this thread, if it fits, belongs to `layer`, whose `see(query, real)` is called."""
    _last.layer = layer


def show_queries(model: nn.Module) -> bool:
    """Give a model the attention function that shows queries, which stays; false where its own is not stood in front of, or
    cannot be exchanged (Bloom, Falcon, MPT)."""
    own = model.config._attn_implementation
    if own in _SHOWN:
        look_before(model, _PREFIX + own, _show)
    return model.config._attn_implementation.startswith(_PREFIX)


def _show(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None] | None:
    answer = None
    if isinstance(key, Unread):
        answer = _answer(module, query, key, value, mask, options)
        if answer is None:
            key.read()  # before the queries let anything be packed
    layer, _last.layer = getattr(_last, "layer", None), None
    if layer is None or key.shape[2] != layer.length or getattr(module, "layer_idx", layer.index) != layer.index:
        return answer
    if key.shape[:2] == (layer.shape["batch"], layer.shape["heads"]):
        layer.see(query, _real(mask, query.shape[2], key.shape[2]))
    return answer


def _answer(
    module: nn.Module, query: Tensor, key: Unread, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, None] | None:
    """Attention on the packed bytes, where it is plain: no weights asked for, no gradients, nothing that we do not know."""
    untouched = isinstance(value, Unread) and value.once is key.once and not key.once
    strange = any(
        isinstance(given, Tensor) or given not in (None, False, 0) for name, given in options.items() if name not in _PLAIN
    )
    if not untouched or strange or query.requires_grad or query.shape[2] != key.layer.newest:
        return None
    if mask is None and query.shape[2] > 1:  # several tokens come with a mask that says which of them may read which
        return None
    if module.config._attn_implementation != _PREFIX + "sdpa":
        return None
    readable = None
    if mask is not None:
        readable = _readable(mask, query.shape[2], key.shape[2])
        if readable is None:
            return None
    out = key.layer.attend(query, readable, options.get("scaling") or query.shape[-1] ** -0.5)
    return None if out is None else (out, None)


def _real(mask: Tensor | None, queries: int, tokens: int) -> Tensor | None:
    """Which of the newest tokens are no padding, `[batch, queries]`: a real token may read itself, in some head."""
    if mask is None:
        return None
    if mask.ndim != 4:
        return _allowed(mask[:, -queries:])
    newest = mask[:, :, -queries:, tokens - queries : tokens]
    return _allowed(newest.diagonal(dim1=2, dim2=3)).any(dim=1)


def _readable(mask: Tensor, queries: int, tokens: int) -> Tensor | None:
    """Which tokens the newest query may read, `[batch, tokens]` on the CPU; None where heads differ, a bias is added, or
    another query may not read just those of them that are no newer than itself.

    All layers of a model get one mask: it is fetched from its device once.
    """
    known, version = getattr(_last, "mask", None), None if mask.is_inference() else mask._version
    if known is not None and known[0]() is mask and known[1] == (queries, tokens, version):
        return known[2]
    found = None
    if mask.ndim == 4 and mask.shape[1] == 1:
        newest = mask[:, 0, -queries:, :tokens].cpu()
        allowed = _allowed(newest)
        found = allowed[:, -1]
        causal = torch.ones(allowed.shape[1:], dtype=torch.bool, device="cpu").tril(tokens - queries)
        plain = torch.equal(allowed, found[:, None] & causal)
        if not plain or (newest.is_floating_point() and newest[allowed].any()):
            found = None
    _last.mask = weakref.ref(mask), (queries, tokens, version), found
    return found


def _allowed(mask: Tensor) -> Tensor:
    """A mask as booleans: whether a score is left over."""
    if mask.dtype == torch.bool:
        return mask
    return mask > (torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else 0)
