"""Perplexity and divergence against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from compress.errors import CompressError
from compress.evaluate.compare import compare, table
from compress.evaluate.quality import measure
from compress.evaluate.text import make_windows
from helpers import tiny_model, tiny_tokenizer


def test_windows_follow_the_protocol() -> None:
    rows = ["ab" * 30, "cd" * 30]
    tokens = make_windows(rows, tiny_tokenizer(), length=50)
    windows = tokens.ids
    stream = tiny_tokenizer()("\n\n".join(rows))["input_ids"]
    assert windows.shape == (2, 50) and windows.flatten().tolist() == stream[:100]
    assert tokens.notes == ("22 of the 122 tokens of the text were left out",)
    assert make_windows(rows, tiny_tokenizer(), length=50, limit=1).ids.shape == (1, 50)
    with pytest.raises(CompressError, match="lower --length"):
        make_windows(["abc"], tiny_tokenizer(), length=50)


def test_measures_match_their_definitions() -> None:
    ours, theirs = tiny_model("llama"), tiny_model("llama", seed=1)
    windows = torch.randint(0, 256, (3, 20))
    quality, original = measure(ours, windows, theirs)
    with torch.inference_mode():
        loss = ours(windows, labels=windows).loss
        p = torch.log_softmax(theirs(windows).logits[:, :-1].double(), -1)
        q = torch.log_softmax(ours(windows).logits[:, :-1].double(), -1)
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert float(quality.kl.mean()) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert float(quality.agreement.mean()) == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert original.perplexity == pytest.approx(measure(theirs, windows)[0].perplexity)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_model("llama")
    result = compare(model, tiny_tokenizer(), model, dataset="python-docs", length=64, windows=4)
    assert result["compressed"]["quality"]["kl"] == pytest.approx(0, abs=1e-6)
    assert result["compressed"]["quality"]["top1_agreement"] == 1
    assert result["loss_difference"] == 0
    assert table(result).row_count == 3
