"""Perplexity and divergence against their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import compress
from compress.cache.attached import attach, new_cache
from compress.errors import CompressError
from compress.evaluate.compare import compare, table
from compress.evaluate.quality import differences, empty_cache, log_probabilities, measure, through_own_cache
from compress.evaluate.text import make_windows
from compress.recipe import Recipe
from compress.run import run
from helpers import tiny_model, tiny_recipe, tiny_tokenizer


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
    assert all(value == pytest.approx(0, abs=1e-6) for value in result["difference"]["quality"].values())
    assert table(result).row_count == 3


def test_differences_are_paired() -> None:
    ours, theirs = measure(tiny_model("llama"), torch.randint(0, 256, (4, 20)), tiny_model("llama", seed=1))
    found = differences(ours, theirs)
    loss = ours.nll - theirs.nll
    assert found["loss"] == pytest.approx(float(loss.mean()))
    assert found["loss_stderr"] == pytest.approx(float(loss.std() / 2))
    assert found["perplexity"] == pytest.approx(ours.perplexity - theirs.perplexity)
    assert found["kl"] == pytest.approx(float(ours.kl.mean()))
    assert found["top1_agreement"] == pytest.approx(float(ours.agreement.mean()) - 1)
    # the error of the perplexities' difference, by leaving one window out (jackknife; equal to first order)
    parts = []
    for left in range(4):
        rest = [index for index in range(4) if index != left]
        parts.append(float(ours.nll[rest].mean().exp() - theirs.nll[rest].mean().exp()))
    jackknife = math.sqrt(3 / 4 * sum((part - sum(parts) / 4) ** 2 for part in parts))
    assert found["perplexity_stderr"] == pytest.approx(jackknife, rel=0.3)


def test_one_window_has_no_error_and_the_json_stays_valid() -> None:
    model = tiny_model("llama")
    result = compare(model, tiny_tokenizer(), tiny_model("llama", seed=1), dataset="python-docs", length=64, windows=1)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["compressed"]["quality"]["perplexity_stderr"] is None
    assert result["difference"]["quality"]["kl_stderr"] is None
    assert result["environment"] | {"versions": 0, "threads": 0} == {
        "versions": 0, "threads": 0, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert result["protocol"]["kv_cache"] is None and "were left out" in table(result).caption


def test_a_broken_model_gives_nulls() -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    result = compare(model, tiny_tokenizer(), dataset="python-docs", length=64, windows=2)
    json.dumps(result, allow_nan=False)
    assert result["compressed"]["quality"]["perplexity"] is None
    assert [column.header for column in table(result).columns] == ["", "model"], "a plain model, and nothing beside it"


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(CompressError, match="original has a vocabulary of 300 tokens, the model one of 256"):
        compare(tiny_model("llama"), tiny_tokenizer(), tiny_model("llama", vocab_size=300), dataset="python-docs")


def test_a_model_with_a_cache_is_measured_through_it(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = {**tiny_recipe(), "weights": {"method": "rtn", "bits": 8}, "kv_cache": {"bits": 2}}
    run(tiny_llama, Recipe.from_dict(recipe), tmp_path / "out")
    model = compress.load(tmp_path / "out")
    result = compare(model, tiny_tokenizer(), dataset="python-docs", length=64, windows=2)
    spec = result["protocol"]["kv_cache"]
    assert spec["method"] == "per_token" and spec["bits"] == 2 and spec["exact_prefill"] is False
    assert "read through the per_token cache, 2-bit setting" in str(table(result).title)
    weights = [m for m in model.modules() if hasattr(m, "spec")]
    scales = sum(16 * m.out_features for m in weights) / sum(m.in_features * m.out_features for m in weights)
    assert result["compressed"]["bits"] == {"bits_per_weight": pytest.approx(8 + scales), "bits_per_activation": 16}
    assert result["compressed"]["quality"]["bits_per_key_or_value"] == 2 + 2 * 16 / 16  # a scale and a minimum per head
    window = torch.randint(0, 256, (20,))
    with torch.inference_mode():
        plain = torch.log_softmax(model(window[None]).logits[0, :-1].float(), -1)
        with through_own_cache(model):
            cached = torch.log_softmax(model(window[None]).logits[0, :-1].float(), -1)
        again = torch.log_softmax(model(window[None]).logits[0, :-1].float(), -1)
        assert torch.equal(cached, log_probabilities(model, window, empty_cache(model)))
    assert torch.equal(plain, again) and not torch.allclose(plain, cached, atol=1e-3)


def test_windowed_caches_are_decoded() -> None:
    """With a window that holds everything the figures are those of a forward pass over the second half."""
    model, original, windows = tiny_model("llama"), tiny_model("llama", seed=1), torch.randint(0, 256, (3, 60))
    attach(model, "kivi", {"window": 60})
    ours, theirs = measure(model, windows, original)
    with torch.inference_mode():
        p, q = (torch.log_softmax(m(windows).logits[:, 29:-1].double(), -1) for m in (original, model))
    target = windows[:, 30:, None]
    for quality, logs in ((ours, q), (theirs, p)):
        assert torch.allclose(quality.nll, -logs.gather(2, target).mean(dim=(1, 2)), rtol=1e-4)
    assert torch.allclose(ours.kl, (p.exp() * (p - q)).sum(-1).mean(1), rtol=1e-3)
    assert ours.cache_bits == 32  # fp32 states, nothing packed

    attach(model, "squat", {"window": 8, "group_size": 8, "bits": 2})
    packed, _ = measure(model, windows[:1])
    cache, logs = new_cache(model), []
    with torch.inference_mode():
        for part in windows[:1].split([30, *[1] * 29, 1], dim=1)[:-1]:
            logs.append(torch.log_softmax(model(part, past_key_values=cache).logits[:, -1].double(), -1))
    want = -torch.stack(logs, 1).gather(2, target[:1]).mean()
    assert float(packed.nll[0]) == pytest.approx(float(want), rel=1e-4)
    assert packed.cache_bits == cache.bits_per_element < 20 and abs(packed.nll[0] - ours.nll[0]) > 1e-4


def test_recipes_may_ask_for_squat(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = {**tiny_recipe(), "weights": {"method": "rtn", "bits": 8}, "kv_cache": {"method": "squat", "group_size": 8}}
    run(tiny_llama, Recipe.from_dict(recipe), tmp_path / "out")
    result = compare(compress.load(tmp_path / "out"), tiny_tokenizer(), dataset="python-docs", length=64, windows=2)
    decoding = result["compressed"]["decoding"]
    cache = new_cache(compress.load(tmp_path / "out"))
    assert 0 < decoding["cache_bytes"] < 3 * 2 * 2 * 64 * 16 * 4 and decoding["tokens_per_second"] > 0  # below fp32's bytes
    assert cache.nbytes == 0 and decoding["peak_memory_bytes"] > 1e8
    assert result["protocol"]["decoded"] and "the second half of each window" in str(table(result).title)
    with pytest.raises(CompressError, match="squat takes no basis"):
        Recipe.from_dict({**recipe, "kv_cache": {"method": "squat", "basis": "pca"}})
