"""Decode steps that attend to packed bytes: the answers of multiplying out, and multiplied out for whoever looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cache_helpers import prompt, states
from compress.cache import KVCache, kivi
from compress.cache.queries import _show
from compress.cache.unread import Unread
from compress.kernels import group_attention
from helpers import tiny_model

OPTIONS = {"window": 8, "group_size": 16}


def decoded(model: torch.nn.Module, cache: KVCache, mask: Tensor, tokens: int = 20) -> Tensor:
    """Logits of some tokens behind a padded prompt."""
    torch.manual_seed(1)
    ids = prompt(len(mask), mask.shape[1])
    logits = []
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        for token in range(tokens):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits.append(model(torch.full((len(mask), 1), 5 + token), attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def padded(*real: int, length: int = 70) -> Tensor:
    return torch.stack([torch.arange(length) >= length - count for count in real]).long()


def reading(cache: KVCache) -> KVCache:
    """The same cache multiplied out at every step."""
    for layer in cache.packed:
        layer.read = layer.dense
    return cache


def decoding(method: str) -> tuple[torch.nn.Module, kivi.Layer]:
    """A model, and the first layer of a cache in the middle of decoding."""
    model = tiny_model("llama")
    cache = KVCache(model, method, **OPTIONS)
    decoded(model, cache, padded(70, 70), tokens=2)
    cache.layers[0].newest = 1
    return model, cache.layers[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every attention on packed bytes."""
    found: list[int] = []
    attend = kivi.attend
    monkeypatch.setattr(kivi, "attend", lambda *args: found.append(1) or attend(*args))
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("method", ["kivi", "squat"])
@pytest.mark.parametrize("options", [{}, {"bits": 4, "affine_bits": 16, "sink_tokens": 0}], ids=str)
def test_the_answers_are_those_of_multiplying_out(kind: str, method: str, options: dict, calls: list[int]) -> None:
    model, mask = tiny_model(kind), padded(70, 51, 70)
    got = decoded(model, KVCache(model, method, **OPTIONS | options), mask)
    assert len(calls) >= 20
    count = len(calls)
    want = decoded(model, reading(KVCache(model, method, **OPTIONS | options)), mask)
    assert len(calls) == count
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def in_steps(model: torch.nn.Module, cache: KVCache, mask: Tensor, steps: list[int]) -> Tensor:
    """Logits of a padded prompt's continuation, so many tokens at a time."""
    torch.manual_seed(1)
    ids = prompt(len(mask), mask.shape[1] + sum(steps))
    logits = []
    with torch.no_grad():
        model(ids[:, : mask.shape[1]], attention_mask=mask, past_key_values=cache)
        for new in steps:
            part = ids[:, mask.shape[1] : mask.shape[1] + new]
            mask = torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)
            logits.append(model(part, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", ["kivi", "squat"])
def test_several_new_tokens(kind: str, method: str, calls: list[int]) -> None:
    """Each reads those before it and packed bytes, and a group that they fill is packed behind their attention."""
    model, mask, steps = tiny_model(kind), padded(70, 51, 70), [5, 8, 1, 3, 8, 2, 7, 9]
    cache, other = KVCache(model, method, **OPTIONS), reading(KVCache(model, method, **OPTIONS))
    got = in_steps(model, cache, mask, steps)
    layers = sum(isinstance(layer, kivi.Layer) for layer in cache.layers)
    assert len(calls) == layers * (len(steps) - 1)  # 9 tokens are too many
    torch.testing.assert_close(got, in_steps(model, other, mask, steps), rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(cache.packed, other.packed, strict=True):
        for one, two in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(one.rows().float(), two.rows().float(), rtol=1e-3, atol=1.0)  # codes may differ by 1


@pytest.mark.parametrize("steps", [[3, 1, 8], [1, 1]], ids=str)
def test_under_inference_mode(steps: list[int], calls: list[int]) -> None:
    """Masks made there have no version to tell a changed one by."""
    model, mask = tiny_model("llama"), padded(70, 51)
    with torch.inference_mode():
        got = in_steps(model, KVCache(model, "squat", **OPTIONS), mask, steps)
    assert calls
    want = in_steps(model, reading(KVCache(model, "squat", **OPTIONS)), mask, steps)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_new_tokens_that_read_in_another_order(calls: list[int]) -> None:
    """A tree of candidates, and padding among the new tokens: multiplied out, as they are no plain steps."""
    model, ids = tiny_model("llama"), prompt(2, 70)
    tree = torch.ones(2, 1, 3, 73, dtype=torch.bool)
    tree[:, :, 2, 71] = tree[:, :, 0, 71:] = tree[:, :, 1, 72] = False  # the last two both follow the first
    ragged = torch.ones(2, 73, dtype=torch.long)
    ragged[0, 70] = 0
    for mask in (tree, ragged):
        logits = []
        for cache in (KVCache(model, "kivi", **OPTIONS), reading(KVCache(model, "kivi", **OPTIONS))):
            with torch.no_grad():
                model(ids, past_key_values=cache)
                logits.append(model(ids[:, :3], attention_mask=mask, past_key_values=cache).logits)
        assert torch.equal(*(x[:, -1] for x in logits))
    assert not calls


def test_keys_that_are_read_too_late_are_refused(calls: list[int]) -> None:
    """What several new tokens were answered by is packed at once: no mixture is handed out."""
    model = tiny_model("llama")
    cache = KVCache(model, "kivi", **OPTIONS)
    ids = prompt(1, 70)
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        model(ids, past_key_values=cache)
    layer = cache.packed[0]
    update = layer.update
    layer.update = lambda *args, **options: kept.append(update(*args, **options)) or kept[-1]
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
    assert calls
    with pytest.raises(RuntimeError, match="must be read, or cloned"):
        kept[0][0] + 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, calls: list[int]) -> None:
    """fp16 scales are left to the reference; sums are fp32, so answers are those of plain attention to its rounding."""
    model, mask = tiny_model("llama").to(dtype), padded(70)
    got = decoded(model, KVCache(model, "squat", **OPTIONS), mask)
    want = decoded(model, reading(KVCache(model, "squat", **OPTIONS)), mask)
    assert calls and got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


def test_what_cannot_be_answered_is_multiplied_out(calls: list[int]) -> None:
    """fp64, eager attention, a stored token that may not be read, key biases behind rotary embedding."""
    mask = padded(70, 60)
    for model in (tiny_model("llama").double(), tiny_model("llama", attn_implementation="eager")):
        cache = KVCache(model, "kivi", **OPTIONS)
        assert torch.equal(decoded(model, cache, mask), decoded(model, reading(KVCache(model, "kivi", **OPTIONS)), mask))
    assert not calls
    model = tiny_model("llama")
    cache, other = KVCache(model, "kivi", **OPTIONS), reading(KVCache(model, "kivi", **OPTIONS))
    ids, hidden = prompt(2, 70), torch.ones(2, 71, dtype=torch.long)
    hidden[0, 40] = 0  # stored, and hidden afterwards
    with torch.no_grad():
        for one in (cache, other):
            model(ids, past_key_values=one)
        first, second = (model(ids[:, :1], attention_mask=hidden, past_key_values=one).logits for one in (cache, other))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_masks_of_every_kind(calls: list[int]) -> None:
    """One row for the whole batch, another one for every head, a bias instead of a mask."""
    model, ids = tiny_model("llama"), prompt(2, 60)
    heads = model.config.num_attention_heads
    everywhere = torch.ones(1, 1, 1, 61, dtype=torch.bool)
    by_head = torch.ones(2, heads, 1, 61, dtype=torch.bool)
    by_head[:, 1, :, 30:50] = False
    additive, bias = torch.zeros(2, 1, 1, 61), torch.randn(2, 1, 1, 61)
    for mask, packed in ((everywhere, True), (by_head, False), (additive, True), (bias, False)):
        answers = []
        for change in (lambda cache: cache, reading):
            cache = change(KVCache(model, "kivi", **OPTIONS))
            calls.clear()
            with torch.no_grad():
                model(ids, past_key_values=cache)
                answers.append(model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits)
            assert change is reading or bool(calls) == packed
        torch.testing.assert_close(*answers, rtol=1e-4, atol=2e-5)


def test_a_token_hidden_from_the_newest_query_is_not_padding() -> None:
    model, ids = tiny_model("llama"), prompt(1, 60)
    mask = torch.ones(1, 1, 4, 64, dtype=torch.bool).tril(60)
    mask[..., 3, 62] = False
    cache, plain = KVCache(model, "squat", bits=16), DynamicCache(config=model.config)
    for one in (cache, plain):
        with torch.no_grad():
            model(ids, past_key_values=one)
            model(ids[:, :4], attention_mask=mask, past_key_values=one)
    assert not cache.layers[0].stores[0].gaps
    with torch.no_grad():
        first, second = (model(ids[:, :1], past_key_values=one).logits for one in (cache, plain))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=2e-5)


def test_only_plain_attention_is_answered() -> None:
    """Changed values, options that we do not know, a cache that sends its layers away: the model's own attention runs."""
    model, layer = decoding("kivi")
    module = model.model.layers[0].self_attn
    query = torch.randn(2, model.config.num_attention_heads, 1, model.config.head_dim)
    keys, values = layer.read()
    assert _show(module, query, keys, values, None, scaling=0.25, dropout=0.0, use_cache=True) is not None
    for options in ({"softcap": 50.0}, {"sinks": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"dropout": 0.1}):
        assert _show(module, query, keys, values, None, **options) is None
    assert _show(module, query, keys, values * 2, None) is None, "who read them may have changed them"
    layer.stays = False
    assert all(type(states) is Tensor for states in layer.read())


def test_the_mask_may_come_by_its_name() -> None:
    """As the vision towers of many models pass it."""
    model = tiny_model("llama")
    KVCache(model, "kivi")
    attention = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    module, states = model.model.layers[0].self_attn, torch.randn(1, 4, 3, 16)
    out, _ = attention(module, states, states[:, :2], states[:, :2], attention_mask=None, scaling=0.25)
    assert out.shape == (1, 3, 4, 16)


@pytest.mark.parametrize("change", ["crop", "reorder_cache", "batch_repeat_interleave", "reset"])
def test_states_that_the_cache_no_longer_has_are_refused(change: str) -> None:
    _, layer = decoding("kivi")
    keys, _ = layer.read()
    arguments = {"crop": [-5], "reorder_cache": [torch.tensor([1, 0])], "batch_repeat_interleave": [2], "reset": []}
    getattr(layer, change)(*arguments[change])
    with pytest.raises(RuntimeError, match="before the cache goes on"):
        keys + 0


def test_whoever_touches_them_gets_the_states() -> None:
    _, layer = decoding("squat")
    keys, values = layer.read()
    dense = layer.dense()
    assert isinstance(keys, Unread) and "Unread" in repr(keys)
    for lazy, whole in zip((keys, values), dense, strict=True):
        assert lazy.shape == whole.shape and lazy.dtype == whole.dtype and lazy.device == whole.device
        assert torch.equal(lazy + 0, whole) and torch.equal(torch.cat([whole, lazy], dim=2)[:, :, whole.shape[2] :], whole)
        assert torch.equal(lazy.transpose(1, 2).contiguous(), whole.transpose(1, 2)) and type(lazy.clone()) is Tensor
    more = dense[0][:, :, -1:]
    stale, _ = layer.read()
    layer.update(more, more)
    assert torch.equal(keys + 0, dense[0]), "read before, so it stays what it was"
    with pytest.raises(RuntimeError, match="before the cache goes on"):
        stale + 0


def test_nothing_of_the_size_of_the_cache_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a long conversation multiplies nothing out."""
    model = tiny_model("llama")
    cache = KVCache(model, "squat", **OPTIONS)
    keys = states(2000, heads=2, head_dim=model.config.head_dim)
    for index, layer in enumerate(cache.packed):
        cache.update(keys, keys, index)
        layer.see(torch.randn(2, 4, 8, keys.shape[-1]), None)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("multiplied out")

    monkeypatch.setattr("compress.cache.groups.expand_groups", refuse)
    if group_attention.cpu.compiled() is not None:
        monkeypatch.setattr(group_attention, "expand_groups_reference", refuse)
    with torch.no_grad():
        out = model(prompt(2, 1), past_key_values=cache).logits
    assert out.isfinite().all()
