"""An attention function of our own in front of the model's: it looks at what attention gets, and hands it on unchanged or
answers in the model's place.

Transformers lets an attention function be registered by name. A mask function must be registered under the same name, or
padding would be ignored in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

Look = Callable[..., Any]


def look_before(model: nn.Module, name: str, look: Look) -> str:
    """Call `look(attention module, query, key, value, mask, **options)` before every attention of the model from now on.

    What it returns is the result of attention; where it returns None, the model's own attention runs.

    The function is registered as `name`; the name of the one that it stands in front of is returned.
    """
    own = model.config._attn_implementation

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:  # the mask under the name that some models pass it by
        answer = look(module, query, key, value, attention_mask, **options)
        if answer is not None:
            return answer
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)  # each architecture's own
        return ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation(name)
    return own
