"""Perplexity and divergence by decoding: the first half of a window is the prompt, the rest comes as in generation.

For KV caches that keep their newest tokens exact and round them later: in one forward pass such a cache would be read
either not at all or without its window. Windows are decoded side by side, the original in step with the model. A prompt is
read exactly, so its tokens tell nothing and are not counted.

Tokens between two roundings meet the same packed states and exact neighbours whether they come one by one or together. So
`KVCache.alike()` of them are fed at once, about a group; figures are those of single steps to floating-point rounding.
Cost: length / 2 tokens per window and model in calls of up to a group; logits of one call of a batch are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compress.cache import KVCache
from compress.cache.attached import new_cache
from compress.cache.layer import CACHE_ARGUMENT

_BATCH = 16  # windows side by side
_LOGITS = 1 << 26  # numbers: bounds the logits of one call


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
        sums = decode(model, cache, batch, original, prompt_length(batch.shape[1]))
        for name, total in sums.items():
            columns.setdefault(name, []).append(total / (batch.shape[1] - prompt_length(batch.shape[1])))
        bits = cache.bits_per_element
        for _ in batch:
            tick()
    return {name: torch.cat(parts).cpu() for name, parts in columns.items()}, bits


def decode(model: nn.Module, cache: KVCache, ids: Tensor, original: nn.Module | None, prompt: int) -> dict[str, Tensor]:
    """Sums over the tokens behind the first `prompt` of every row of `ids` `[rows, length]`: the columns above."""
    sides = {"nll": (model, cache)}
    if original is not None:
        sides["original"] = (original, DynamicCache(config=original.config))
    sums: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0) + values.double().sum(dim=1).cpu()

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    most = max(1, _LOGITS // (len(ids) * vocabulary))
    start, stop = 0, prompt  # what is fed
    while start < ids.shape[1] - 1:
        count = 1 if start == 0 else stop - start  # of the prompt's tokens only the last one predicts
        targets, seen = ids[:, stop - count + 1 : stop + 1, None], {}
        for name, (side, own) in sides.items():
            fed = ids[:, start:stop].to(next(side.parameters()).device)
            logits = side(fed, **{CACHE_ARGUMENT: own}, use_cache=True, logits_to_keep=count).logits
            seen[name] = torch.log_softmax(logits.float(), dim=-1)
            add(name, -seen[name].gather(2, targets.to(logits.device)).squeeze(2))
        if original is not None:
            ours, theirs = seen["nll"], seen["original"].to(seen["nll"].device)
            add("kl", (theirs.exp() * (theirs - ours)).sum(dim=2))
            add("agreement", theirs.argmax(2) == ours.argmax(2))
        start, stop = stop, min(ids.shape[1] - 1, stop + min(most, cache.alike()))
    return sums
