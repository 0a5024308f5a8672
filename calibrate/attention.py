"""Queries, keys and values as attention gets them: after projections, head norms and rotary embedding.

Transformers lets an attention function be registered by name; ours shows its arguments to an observer and hands them to
the one that the model uses. A mask function must be registered under the same name, or padding would be ignored in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_NAME = "compress_observed"
Observer = Callable[[nn.Module, Tensor, Tensor, Tensor], None]


@contextmanager
def observed_attention(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer(attention module, query, key, value)` at every attention of the model.

    query `[batch, heads, tokens, head_dim]`, key and value `[batch, kv heads, tokens, head_dim]`.
    """
    own = model.config._attn_implementation

    def observed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        observer(module, query, key, value)
        eager = sys.modules[type(module).__module__].eager_attention_forward  # each architecture has one of its own
        return ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)(module, query, key, value, mask, **options)

    AttentionInterface.register(_NAME, observed)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
