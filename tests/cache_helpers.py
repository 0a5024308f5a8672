"""States, layers and decoding for the tests of KV caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.cache import read_config
from compress.cache.per_token import Layer
from compress.kernels.affine_groups import EIGHT_BITS
from compress.kernels.pack import pack, packed_width


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


def packed_groups(
    bits: int, rows: int, tokens: int, runs: int, run: int, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows inside larger, poisoned buffers, as a growing cache holds them."""
    codes = torch.randint(0, 1 << bits, (2, 3, rows, tokens * runs * run), dtype=torch.uint8)
    packed = torch.full((2, 3, rows + 5, packed_width(codes.shape[-1], bits)), 255, dtype=torch.uint8)
    packed[:, :, :rows] = pack(codes, bits)
    numbers = torch.randn(2, 3, rows, 2 * runs)
    affine = torch.full((2, 3, rows + 5, 2 * runs), 127 if kind == EIGHT_BITS else torch.nan)
    affine = affine.to(torch.uint8) if kind == EIGHT_BITS else affine.to(kind)
    affine[:, :, :rows] = numbers.to(EIGHT_BITS).view(torch.uint8) if kind == EIGHT_BITS else numbers.to(kind)
    units = torch.rand(2, 3, 2) + 0.5 if kind == EIGHT_BITS else None
    return packed[:, :, :rows], affine[:, :, :rows], units
