"""Perplexity of a model, and its divergence from the original on the same tokens.

Per predicted token: the negative log-likelihood, KL(original || compressed) in nats, and whether both put the same token
first. Logits become log-probabilities in fp32. Means over tokens; standard errors over windows, because tokens of one
window are not independent. Cost: one forward pass per model and window; logits of one window are held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.cache.attached import new_cache


@dataclass(frozen=True)
class Quality:
    """Per-window means, `[windows]` each, fp64; `kl` and `agreement` only when there was an original to compare with."""

    nll: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.mean())

    def summary(self) -> dict[str, Any]:
        """Means and standard errors, ready for JSON. The error of the perplexity is exp's slope times that of the loss."""
        loss, loss_error = mean_and_error(self.nll)
        summary = {
            "windows": len(self.nll),
            "loss": loss,
            "loss_stderr": loss_error,
            "perplexity": self.perplexity,
            "perplexity_stderr": self.perplexity * loss_error,
        }
        for name, values in (("kl", self.kl), ("top1_agreement", self.agreement)):
            if values is not None:
                summary[name], summary[f"{name}_stderr"] = mean_and_error(values)
        return summary


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is unknown and given as NaN."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """`[length - 1, vocabulary]` fp32 log-probabilities of each next token of one window `[length]`.

    A model with a KV cache of its own reads every key and value through it. Its caches quantize token by token, so one
    pass sees what decoding would see.
    """
    device = next(model.parameters()).device
    cache = new_cache(model, exact_prefill=False)  # an exact prompt would look lossless
    logits = model(window[None].to(device), past_key_values=cache, use_cache=cache is not None).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


@torch.inference_mode()
def measure(
    model: nn.Module, windows: Tensor, original: nn.Module | None = None, tick: Callable[[], None] = lambda: None
) -> tuple[Quality, Quality | None]:
    """Quality of `model` on token windows `[windows, length]`, and of `original` when given; `tick` after each window."""
    rows: dict[str, list[float]] = {"nll": [], "kl": [], "agreement": [], "original": []}
    for window in windows:
        target = window[1:, None]
        ours = log_probabilities(model, window)
        rows["nll"].append(float(-ours.gather(1, target.to(ours.device)).double().mean()))
        if original is not None:
            theirs = log_probabilities(original, window).to(ours.device)
            rows["original"].append(float(-theirs.gather(1, target.to(ours.device)).double().mean()))
            rows["kl"].append(float((theirs.exp() * (theirs - ours)).sum(dim=1).double().mean()))
            rows["agreement"].append(float((theirs.argmax(1) == ours.argmax(1)).double().mean()))
        tick()
    column = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    if original is None:
        return Quality(column["nll"]), None
    return Quality(column["nll"], column["kl"], column["agreement"]), Quality(column["original"])
