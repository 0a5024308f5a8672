"""Perplexity and divergence by decoding: the first half of a window is the prompt, the rest comes token by token.

For KV caches that keep their newest tokens exact and round them later: in one forward pass such a cache would be read
either not at all or without its window. Windows are decoded side by side, the original in step with the model, so logits
of one token per window are held at a time. A prompt is read exactly, so its tokens tell nothing and are not counted.
Cost: length / 2 forward passes of one token per batch of `_BATCH` windows and model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compress.cache.attached import CACHE_ARGUMENT, new_cache

_BATCH = 16  # windows side by side


def prompt_length(length: int) -> int:
    """Tokens of a window that are its prompt."""
    return length // 2


@torch.inference_mode()
def decoded_columns(
    model: nn.Module, windows: Tensor, original: nn.Module | None, tick: Callable[[], None]
) -> tuple[dict[str, Tensor], float]:
    """Means over the decoded tokens of each window `[windows]` fp64, and the bits of a key or value at the end.

    Columns: `nll`, and with an original `original` (its losses), `kl` and `agreement`.
    """
    columns: dict[str, list[Tensor]] = {}
    bits = 0.0
    for batch in windows.split(_BATCH):
        cache = new_cache(model)
        sums = _decode(model, cache, batch, original)
        for name, total in sums.items():
            columns.setdefault(name, []).append(total / (batch.shape[1] - prompt_length(batch.shape[1])))
        bits = cache.bits_per_element
        for _ in batch:
            tick()
    return {name: torch.cat(parts).cpu() for name, parts in columns.items()}, bits


def _decode(model: nn.Module, cache: Any, ids: Tensor, original: nn.Module | None) -> dict[str, Tensor]:
    sides = {"nll": (model, cache)}
    if original is not None:
        sides["original"] = (original, DynamicCache(config=original.config))
    sums: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0) + values.double().cpu()

    fed, first = ids[:, : prompt_length(ids.shape[1])], prompt_length(ids.shape[1])
    for position in range(first, ids.shape[1]):
        target, seen = ids[:, position : position + 1], {}
        for name, (side, own) in sides.items():
            device = next(side.parameters()).device
            logits = side(fed.to(device), **{CACHE_ARGUMENT: own}, use_cache=True, logits_to_keep=1).logits[:, -1]
            seen[name] = torch.log_softmax(logits.float(), dim=-1)
            add(name, -seen[name].gather(1, target.to(device)).squeeze(1))
        if original is not None:
            ours, theirs = seen["nll"], seen["original"].to(seen["nll"].device)
            add("kl", (theirs.exp() * (theirs - ours)).sum(dim=1))
            add("agreement", theirs.argmax(1) == ours.argmax(1))
        fed = target
    return sums
