"""The whole cache in tiny models of several families: generation, batches, beams, turns, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from cache_helpers import greedy, logits, orthonormal, prompt, states
from compress.cache import KVCache
from compress.errors import CompressError
from helpers import tiny_model


def test_contract_flags() -> None:
    cache = KVCache(tiny_model("llama"))
    assert cache.is_croppable and not cache.is_compileable and cache.is_sliding == [False] * 3
    assert cache.get_max_length() == -1 and cache.get_seq_length() == 0 and cache.get_mask_sizes(5, 0) == (5, 0)
    cache.early_initialization(2, 2, 16, torch.bfloat16, torch.device("cpu"))
    assert cache.is_initialized and cache.bits_per_element == 0 and cache.nbytes == 0
    cache.layers[0].update(*[states(3, head_dim=16, dtype=torch.bfloat16)] * 2)
    assert cache.get_seq_length() == 3 and cache.get_mask_sizes(5, 0) == (8, 0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_sixteen_bits_are_the_dynamic_cache(family: str) -> None:
    model, ids = tiny_model(family), prompt(tokens=24)
    packed, dense = KVCache(model, bits=16), DynamicCache(config=model.config)
    assert torch.equal(logits(model, ids, packed, [20, 1, 3]), logits(model, ids, dense, [20, 1, 3]))
    assert torch.equal(greedy(model, ids, KVCache(model, bits=16)), greedy(model, ids, DynamicCache(config=model.config)))
    assert packed.bits_per_element == 32


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_logits_come_closer_with_every_bit(family: str) -> None:
    changes = {"sliding_window": None} if family == "mistral" else {}
    model, ids = tiny_model(family, **changes), prompt(tokens=24)
    dense = logits(model, ids, None)
    errors = [float((logits(model, ids, KVCache(model, bits=b)) - dense).norm() / dense.norm()) for b in (8, 6, 4, 3, 2)]
    assert errors == sorted(errors) and 0 < errors[0] < 0.01  # measured 0.002 to 0.007


def test_eight_bits_generate_what_dense_does() -> None:
    model, ids = tiny_model("llama"), prompt(tokens=20)
    for start in (ids, ids[:, :1]):  # also a prompt of one token
        dense = greedy(model, start, DynamicCache(config=model.config), new=20)
        assert torch.equal(greedy(model, start, KVCache(model, bits=8), new=20), dense)


def test_bases_change_little_at_eight_bits() -> None:
    model, ids = tiny_model("llama"), prompt(tokens=24)
    dense = logits(model, ids, None)
    cache = KVCache(model, bits=8, key_bases=[orthonormal(16)] * 3, value_bases={0: orthonormal(2, 16), 2: orthonormal(16)})
    error = (logits(model, ids, cache) - dense).norm() / dense.norm()
    assert 0 < error < 0.02
    assert not torch.equal(cache.layers[0].key_side.basis, torch.eye(16))


def test_one_forward_is_token_by_token_decoding() -> None:
    model = tiny_model("llama").double()  # so that the model itself is the same to far below a step
    ids, options = prompt(tokens=20), {"bits": 3, "high_channels": 2, "sink_tokens": 2, "key_bases": [orthonormal(16)] * 3}
    once, streamed = KVCache(model, **options), KVCache(model, **options)
    torch.testing.assert_close(logits(model, ids, once), logits(model, ids, streamed, [1] * 20), rtol=0, atol=1e-5)
    for one, other in zip(once.layers, streamed.layers, strict=True):
        for side, other_side in zip(one.sides, other.sides, strict=True):
            assert torch.equal(side.codes.rows(), other_side.codes.rows())
            assert torch.equal(side.affine.rows(), other_side.affine.rows())


def test_left_padding_changes_nothing() -> None:
    model, ids = tiny_model("llama"), prompt(1, 9)
    alone = greedy(model, ids, KVCache(model, bits=4))
    padded = torch.cat([prompt(1, 14), torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :5] = 0
    assert torch.equal(greedy(model, padded, KVCache(model, bits=4), attention_mask=mask)[1, 14:], alone[0, 9:])


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2}], ids=str
)
def test_beam_scores_are_those_of_the_texts(kwargs: dict[str, int]) -> None:
    model, ids = tiny_model("llama").double(), prompt()
    result = greedy(
        model, ids, KVCache(model, bits=4), return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **kwargs
    )
    texts = result.sequences
    log_probs = logits(model, texts, KVCache(model, bits=4)).log_softmax(dim=-1)
    chosen = log_probs[:, :-1].gather(2, texts[:, 1:, None]).squeeze(2)[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(result.sequences_scores.double(), chosen.sum(dim=1), rtol=0, atol=1e-4)


def test_chunked_prefill_and_drafts_change_nothing() -> None:
    model = tiny_model("llama")
    ids = torch.cat([prompt(1, 6)] * 3, dim=1)  # drafts from the prompt are partly refused: many tokens at once, then crop
    plain = greedy(model, ids, KVCache(model, bits=4), new=30)
    assert torch.equal(greedy(model, ids, KVCache(model, bits=4), new=30, prompt_lookup_num_tokens=4), plain)
    assert torch.equal(greedy(model, ids, KVCache(model, bits=4), new=30, prefill_chunk_size=5), plain)


def test_turns_continue_and_forks_do_not_disturb() -> None:
    model, ids = tiny_model("llama"), prompt(1)
    cache = KVCache(model, bits=8)
    first = greedy(model, ids, cache)
    fork = copy.deepcopy(cache)
    second = greedy(model, torch.cat([first, prompt(1, 5)], dim=1), cache)
    dense = DynamicCache(config=model.config)
    greedy(model, ids, dense)
    assert torch.equal(greedy(model, second[:, : first.shape[1] + 5], dense), second)
    assert fork.get_seq_length() == first.shape[1] - 1
    assert torch.equal(greedy(model, second[:, : first.shape[1] + 5], fork), second)
    cache.reset()
    assert torch.equal(greedy(model, ids, cache), first)


def test_hybrid_models_keep_their_sliding_layers() -> None:
    model, ids = tiny_model("gemma3_text"), prompt(tokens=30)  # the window is 16
    cache = KVCache(model, bits=4)
    greedy(model, ids, cache, num_beams=2)
    assert cache.is_sliding == [True, False, True, False] and cache.get_seq_length() == 30 + 11
    assert cache.layers[1].bits_per_element == 6 and cache.layers[0].keys.shape[2] == 15
    packed, own = 2 * 4 * 2 * 41 * 2 * 12, 2 * 4 * 2 * 15 * 2 * 16 * 4
    assert cache.nbytes == packed + own
    assert cache.bits_per_element == pytest.approx(8 * (packed + own) / (2 * 4 * 2 * (41 + 15) * 2 * 16))


def test_spec_and_tensors_make_the_same_cache() -> None:
    model, ids = tiny_model("llama"), prompt()
    bases = {layer: orthonormal(2, 16) for layer in range(3)}
    cache = KVCache(model.config, bits=3, high_channels=4, sink_tokens=1, key_bases=bases)
    again = KVCache(model, **cache.spec, key_bases=bases)
    assert torch.equal(logits(model, ids, cache), logits(model, ids, again)) and again.spec == cache.spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "per_tokn"}, "did you mean 'per_token'"),
        ({"bits": 9}, "bits: expected 2 to 8, or 16"),
        ({"value_bits": 1}, "value_bits: expected 2 to 8, or 16"),
        ({"high_chanels": 4}, "did you mean 'high_channels'"),
        ({"high_bits": 12}, "high_bits: .* got 12"),
        ({"sink_tokens": -1}, "sink_tokens: .* got -1"),
        ({"key_bases": [torch.eye(16)]}, "key_bases: expected one per layer, 3, got 1"),
        ({"value_bases": {7: torch.eye(16)}}, "value_bases: expected layer indices 0 to 2, got 7"),
        ({"key_bases": {0: 2 * torch.eye(16)}}, "orthonormal"),
        ({"key_bases": {0: torch.ones(16)}}, "a basis is"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        KVCache(tiny_model("llama"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"high_channels": 16}, "below the head_dim of 16"),
        ({"key_bases": {0: torch.eye(8)}}, r"\[16, 16\] or \[2, 16, 16\]"),
    ],
)
def test_options_that_do_not_fit_the_heads_are_named(options: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(CompressError, match=message):
        logits(model, prompt(), KVCache(model, **options))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("deepseek_v3", "deepseek_v3 caches latents"),
        ("deepseek_v32", "deepseek_v32 caches latents"),
        ("qwen3_next", "qwen3_next has layers of type linear_attention"),
        ("mamba", "mamba has layers of type linear_attention"),
        ("t5", "t5 is an encoder-decoder"),
        ("mistral", "mistral has sliding-window layers only"),
    ],
)
def test_models_without_keys_and_values_are_refused_by_name(family: str, message: str) -> None:
    with pytest.raises(CompressError, match=message):
        KVCache(AutoConfig.for_model(family))


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "per_token", {"bits": 4, "high_channels": 2, "sink_tokens": 2}),
        ("llama", "fp8", {}),
        ("qwen3", "kivi", {"window": 8, "group_size": 8, "affine_bits": 8}),
        ("llama", "squat", {"window": 8, "group_size": 8, "fit": 3}),
        ("gemma3_text", "squat", {"window": 8, "group_size": 8}),
    ],
)
@pytest.mark.parametrize("tokens", [40, 5])
def test_a_saved_prefix_goes_on_as_the_one_it_was(
    family: str, method: str, options: dict[str, Any], tokens: int, tmp_path: Path
) -> None:
    model, ids = tiny_model(family), prompt(2, tokens + 20)
    mask = torch.stack([torch.arange(tokens + 20) >= 3, torch.arange(tokens + 20) >= 0]).long()
    first = KVCache(model, method, **options)
    with torch.no_grad():
        model(ids[:, :tokens], attention_mask=mask[:, :tokens], past_key_values=first)
    first.save(tmp_path / "prefix.safetensors")
    second = KVCache(model, method, **options)
    second.load(tmp_path / "prefix.safetensors")
    assert second.get_seq_length() == tokens and second.nbytes == first.nbytes
    if tokens == 40:
        assert (tmp_path / "prefix.safetensors").stat().st_size < first.nbytes + 30_000
    both = [greedy(model, ids, cache, new=12, attention_mask=mask) for cache in (first, second)]
    assert torch.equal(*both)
    second.load(tmp_path / "prefix.safetensors")  # in the place of what it holds
    assert torch.equal(greedy(model, ids, second, new=12, attention_mask=mask), both[0])
    with pytest.raises(CompressError, match=r"other options: exact_prefill=\w+ there, \w+ here"):
        KVCache(model, method, **options, exact_prefill=not first.options.exact_prefill).load(
            tmp_path / "prefix.safetensors"
        )


def test_a_prefix_of_another_version_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = KVCache(model, "kivi")
    with torch.no_grad():
        model(prompt(1, 9), past_key_values=cache)
    facts = cache.layers[0].facts()
    facts["stores"][0]["settled"] = True
    other = KVCache(model, "kivi").layers[0]
    with pytest.raises(CompressError, match="another version of compress, which knew settled"):
        other.rebuild(facts, [buffer.rows() for buffer in cache.layers[0].buffers()], "cpu")


def test_files_that_are_no_prefix_are_named(tmp_path: Path) -> None:
    cache = KVCache(tiny_model("llama"))
    with pytest.raises(CompressError, match="no saved KV cache at"):
        cache.load(tmp_path / "absent")
    (tmp_path / "text").write_text("not a cache")
    with pytest.raises(CompressError, match="is not a saved KV cache, or is damaged"):
        cache.load(tmp_path / "text")
    cache.save(tmp_path / "empty")
    other = KVCache(tiny_model("llama", num_hidden_layers=2))
    with pytest.raises(CompressError, match="holds 3 layers, the model's cache has 2"):
        other.load(tmp_path / "empty")


@pytest.mark.parametrize("method", ["fp8", "kivi", "per_token", "squat"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_generates(method: str, dtype: torch.dtype) -> None:
    model, ids = tiny_model("llama").to(dtype), prompt(2, 50)
    options = {} if method in ("fp8", "per_token") else {"window": 8, "group_size": 8}
    bits = {} if method == "fp8" else {"bits": 8}
    cache, plain = KVCache(model, method, **bits, **options), DynamicCache(config=model.config)
    with torch.no_grad():
        out, want = (
            torch.cat([model(part, past_key_values=each).logits for part in ids.split([40] + [1] * 10, dim=1)], dim=1)
            for each in (cache, plain)
        )
    assert out.dtype == dtype and cache.layers[0].read()[0].dtype == dtype
    assert (out - want).float().norm() < 0.03 * want.float().norm()


@pytest.mark.parametrize("method", ["fp8", "kivi", "per_token", "squat"])
def test_offloaded_layers_come_back(method: str) -> None:
    model, ids = tiny_model("llama"), prompt(2, 60)
    cache, other = KVCache(model, method), KVCache(model, method)
    for each in (cache, other):
        with torch.no_grad():
            model(ids, past_key_values=each)
    for layer in cache.layers:
        layer.offload()
        assert all(buffer.data.device.type == "cpu" for buffer in layer.buffers())
    assert torch.equal(logits(model, ids[:, :3], cache), logits(model, ids[:, :3], other))


def test_eight_bit_floats_err_by_a_sixteenth() -> None:
    cache = KVCache(tiny_model("llama", head_dim=64), "fp8")
    keys, values = states(30), states(30) * 1e-3
    read_keys, read_values = cache.layers[0].update(keys, values)
    for read, x in ((read_keys, keys), (read_values, values)):
        floor = x.abs().amax(dim=-1, keepdim=True) * 2**-17
        assert ((read - x).abs() <= x.abs() / 15.5 + floor).all() and not torch.equal(read, x)
    assert cache.layers[0].bits_per_element == 8 + 16 / 64
    zero = KVCache(tiny_model("llama", head_dim=64), "fp8").layers[0].update(torch.zeros_like(keys), values)
    assert not zero[0].any()


SMALL_GROUPS = {"squat": {"window": 8, "group_size": 8}, "kivi": {"window": 0, "group_size": 8}, "per_token": {}}


@pytest.mark.parametrize("method", SMALL_GROUPS)
def test_what_inference_mode_made_goes_on_outside(method: str, tmp_path: Path) -> None:
    """A copy, a file that was read and a cache that was cut."""
    model, ids, more = tiny_model("llama"), prompt(2, 30), prompt(2, 20)
    first, loaded = (KVCache(model, method, **SMALL_GROUPS[method]) for _ in range(2))
    with torch.inference_mode():
        model(ids, past_key_values=first)
        first.save(tmp_path / "cache.safetensors")
        loaded.load(tmp_path / "cache.safetensors")
        copied, cut = copy.deepcopy(first), copy.deepcopy(first)
        cut.crop(-3)
    want = logits(model, more, first, [1] * 20)
    assert all(torch.equal(logits(model, more, cache, [1] * 20), want) for cache in (copied, loaded))
    assert logits(model, more, cut, [1] * 20).isfinite().all() and cut.get_seq_length() == 47


@pytest.mark.parametrize("method", SMALL_GROUPS)
def test_torchs_defaults_do_not_matter(method: str) -> None:
    """Neither the dtype, which C++ would write beyond, nor the device of what is counted on the CPU."""
    model, ids = tiny_model("llama"), prompt(2, 30)
    plain, other = (KVCache(model, method, **SMALL_GROUPS[method]) for _ in range(2))
    for cache in (plain, other):
        logits(model, ids, cache)
    want = logits(model, ids, plain, [1] * 30)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = logits(model, ids, other, [1] * 30)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    beams = torch.tensor([1, 1, 0])
    for cache, device in ((plain, "cpu"), (other, "meta")):
        with torch.device(device):
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(beams)
        cache.batch_select_indices([0, 2])
    again = logits(model, ids, plain, [1] * 30)
    assert again.shape[0] == 2 and torch.equal(again, logits(model, ids, other, [1] * 30))
