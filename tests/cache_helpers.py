"""States, layers and decoding for the tests of KV caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.cache import read_config
from compress.cache.per_token import Layer


def new_layer(bases: tuple[Tensor | None, Tensor | None] = (None, None), **options: Any) -> Layer:
    return Layer(read_config("per_token", options), *bases)


def states(tokens: int, heads: int = 2, head_dim: int = 64, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heads of unequal scale with an offset, as keys have."""
    return (torch.randn(batch, heads, tokens, head_dim) * torch.rand(heads, 1, head_dim) * 3 + 1).to(dtype)


def orthonormal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.float64))[0].float()


def stored(layer: Layer) -> list[Tensor]:
    return [buffer.rows() for buffer in layer.buffers()]


def same(first: Layer, second: Layer) -> bool:
    return first.length == second.length and all(map(torch.equal, stored(first), stored(second)))


def prompt(batch: int = 2, tokens: int = 12) -> Tensor:
    return torch.randint(3, 256, (batch, tokens))


def greedy(model: torch.nn.Module, ids: Tensor, cache: Any, new: int = 12, **kwargs: Any) -> Tensor:
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, eos_token_id=None, **kwargs)


def logits(model: torch.nn.Module, ids: Tensor, cache: Any, chunks: list[int] | None = None) -> Tensor:
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(chunks or ids.shape[1], dim=1)]
    return torch.cat(parts, dim=1)
