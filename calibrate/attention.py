"""Queries, keys and values as attention gets them: after projections, head norms and rotary embedding.

Transformers lets an attention function be registered by name; ours shows its arguments to an observer and hands them to
SDPA. A mask function must be registered under the same name, or padding would be ignored in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

_NAME = "compress_observed"
Observer = Callable[[nn.Module, Tensor, Tensor, Tensor], None]
_observers: list[Observer] = []


def _observed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    for observer in _observers:
        observer(module, query, key, value)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


@contextmanager
def observed_attention(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer(attention module, query, key, value)` at every attention of the model.

    query `[batch, heads, tokens, head_dim]`, key and value `[batch, kv heads, tokens, head_dim]`.
    """
    AttentionInterface.register(_NAME, _observed)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
        model.set_attn_implementation(before)
