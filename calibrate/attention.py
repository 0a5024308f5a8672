"""Queries, keys and values as attention gets them: after projections, head norms and rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from compress.attention import look_before

_NAME = "compress_observed"
Observer = Callable[[nn.Module, Tensor, Tensor, Tensor], None]


@contextmanager
def observed_attention(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer(attention module, query, key, value)` at every attention of the model.

    query `[batch, heads, tokens, head_dim]`, key and value `[batch, kv heads, tokens, head_dim]`.
    """

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object) -> None:
        observer(module, query, key, value)

    own = look_before(model, _NAME, look)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
