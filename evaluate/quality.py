"""Perplexity of a model, and its divergence from the original on the same tokens.

Per predicted token: the negative log-likelihood, KL(original || compressed) in nats, and whether both put the same token
first. Logits become log-probabilities in fp32. Means over tokens; standard errors over windows, because tokens of one
window are not independent. Differences are paired: both models see the same windows, whose difficulty cancels.
Numbers that do not exist (the error of a single window) or are not finite are None, so that JSON can hold them.
A model with a KV cache of its own reads every key and value through it. Where the cache quantizes token by token, one
pass sees what decoding would see; where it keeps a window of exact tokens, `compress.evaluate.decoding` really decodes.
Cost: one forward pass per model and window; logits of one window are held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from compress.cache import KVCache
from compress.cache.attached import new_cache
from compress.cache.layer import CACHE_ARGUMENT
from compress.evaluate.decoding import decoded_columns


@dataclass(frozen=True)
class Quality:
    """Per-window means, `[windows]` each, fp64; `kl` and `agreement` only when there was an original to compare with."""

    nll: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None
    cache_bits: float | None = None  # per key or value in the cache after a window, everything counted

    @property
    def perplexity(self) -> float:
        return float(self.nll.mean().exp())

    def summary(self) -> dict[str, Any]:
        """Means and standard errors, ready for JSON. The error of the perplexity is exp's slope times that of the loss."""
        summary = {"windows": len(self.nll)}
        for name, values in (("loss", self.nll), ("kl", self.kl), ("top1_agreement", self.agreement)):
            if values is not None:
                summary[name], summary[f"{name}_stderr"] = mean_and_error(values)
            if name == "loss":
                summary["perplexity"] = finite(self.perplexity)
                summary["perplexity_stderr"] = mean_and_error(self.perplexity * self.nll)[1]
        if self.cache_bits is not None:
            summary["bits_per_key_or_value"] = self.cache_bits
        return summary


def differences(ours: Quality, theirs: Quality) -> dict[str, float | None]:
    """`ours` less `theirs` in every figure, with paired standard errors; the original is at KL 0 and agreement 1."""
    slopes = ours.perplexity * ours.nll - theirs.perplexity * theirs.nll  # linear in each window's losses
    columns = {"loss": ours.nll - theirs.nll, "perplexity": slopes, "kl": ours.kl, "top1_agreement": ours.agreement - 1}
    result: dict[str, float | None] = {}
    for name, values in columns.items():
        result[name], result[f"{name}_stderr"] = mean_and_error(values)
    result["perplexity"] = finite(ours.perplexity - theirs.perplexity)
    return result


def mean_and_error(values: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard error over independent values; the error of a single value is unknown."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return finite(float(values.mean())), finite(error)


def finite(value: float) -> float | None:
    """The number, or None for one that JSON cannot hold."""
    return value if math.isfinite(value) else None


@contextmanager
def through_own_cache(model: nn.Module) -> Iterator[None]:
    """Let every forward pass that brings no KV cache read its keys and values through the model's own, if it has one."""
    forward = model.forward

    @wraps(forward)  # generate looks at the signature
    def cached(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get(CACHE_ARGUMENT) is None:
            kwargs.update({CACHE_ARGUMENT: empty_cache(model)}, use_cache=True)
        return forward(*args, **kwargs)

    own = empty_cache(model)
    if own is None or not own.reads_in_one_pass:  # the prompt of a windowed cache is exact: a likelihood never reads it
        yield
        return
    model.forward = cached
    try:
        yield
    finally:
        del model.forward  # the class's own shows again


def empty_cache(model: nn.Module) -> KVCache | None:
    """The model's own cache for one window: an exact prompt would look lossless. None for a model without one."""
    return new_cache(model, exact_prefill=False)


def decode(
    model: nn.Module, windows: Tensor, original: nn.Module | None, tick: Callable[[], None]
) -> tuple[Quality, Quality | None]:
    """`measure` for a cache that one pass does not read: figures of the second half of every window, token by token."""
    columns, bits = decoded_columns(model, windows, original, tick)
    ours = Quality(columns["nll"], columns.get("kl"), columns.get("agreement"), bits)
    return ours, None if original is None else Quality(columns["original"])


def log_probabilities(model: nn.Module, window: Tensor, cache: KVCache | None) -> Tensor:
    """`[length - 1, vocabulary]` fp32 log-probabilities of the next token of one window `[length]`, read through `cache`."""
    device = next(model.parameters()).device
    logits = model(window[None].to(device), **{CACHE_ARGUMENT: cache}, use_cache=cache is not None).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


@torch.inference_mode()
def measure(
    model: nn.Module, windows: Tensor, original: nn.Module | None = None, tick: Callable[[], None] = lambda: None
) -> tuple[Quality, Quality | None]:
    """Quality of `model` on token windows `[windows, length]`, and of `original` when given; `tick` after each window."""
    own = empty_cache(model)
    if own is not None and not own.reads_in_one_pass:
        return decode(model, windows, original, tick)
    rows: dict[str, list[float]] = {"nll": [], "kl": [], "agreement": [], "original": []}
    for window in windows:
        target = window[1:, None]
        cache = empty_cache(model)
        ours = log_probabilities(model, window, cache)
        rows["nll"].append(float(-ours.gather(1, target.to(ours.device)).double().mean()))
        if original is not None:
            theirs = log_probabilities(original, window, empty_cache(original)).to(ours.device)
            rows["original"].append(float(-theirs.gather(1, target.to(ours.device)).double().mean()))
            rows["kl"].append(float((theirs.exp() * (theirs - ours)).sum(dim=1).double().mean()))
            rows["agreement"].append(float((theirs.argmax(1) == ours.argmax(1)).double().mean()))
        tick()
    column = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    bits = None if cache is None else cache.bits_per_element
    if original is None:
        return Quality(column["nll"], cache_bits=bits), None
    return Quality(column["nll"], column["kl"], column["agreement"], bits), Quality(column["original"])
