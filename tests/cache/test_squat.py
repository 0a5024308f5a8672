"""KIVI's groups and SQuat's compensation: identities, equal bytes however a text is cut, less error where queries look."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import compress
from cache_helpers import greedy, prompt, same, states
from compress.cache import KVCache, kivi, query_moments, read_config, squat
from compress.cache.compensation import corrections, visiting_order
from compress.cache.from_weights import _affine, weight_moments
from compress.errors import CompressError
from compress.kernels.affine_groups import expand_groups
from compress.kernels.group_packing import pack_groups
from helpers import tiny_model


def metric(heads: int = 2, width: int = 64) -> Tensor:
    """Second moment of queries of very unequal channels."""
    q = torch.randn(heads, 400, width) @ torch.randn(heads, width, width) * torch.logspace(1, -1, width)
    return q.mT @ q / 400


def layer(method: Any, given: Tensor | None = None, **options: Any) -> kivi.Layer:
    config = read_config(method.__name__.rpartition(".")[2], options)
    return method.Layer(config) if method is kivi else method.Layer(config, metric=given)


def streamed(cache: kivi.Layer, keys: Tensor, values: Tensor, cuts: list[int]) -> kivi.Layer:
    for chunk in zip(keys.split(cuts, dim=2), values.split(cuts, dim=2), strict=True):
        cache.update(*chunk)
    return cache


@pytest.mark.parametrize("method", [kivi, squat])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sinks", [0, 4])
def test_the_same_bytes_however_a_text_is_cut(method: Any, bits: int, sinks: int) -> None:
    keys, values, given = states(150), states(150), metric()
    options = {"bits": bits, "sink_tokens": sinks, "window": 20, "group_size": 16}
    whole = streamed(layer(method, given, **options), keys, values, [150])
    for cuts in ([1] * 150, [3, 60, 1, 86]):
        other = streamed(layer(method, given, **options), keys, values, cuts)
        assert same(whole, other) and all(map(torch.equal, whole.read(), other.read()))
    groups, (store,) = (150 - sinks - 20) // 16, whole.stores
    assert store.key_codes.length == groups and store.exact_keys.length == 150 - 16 * groups
    read = whole.read()[0]
    assert torch.equal(read[:, :, :sinks], keys[:, :, :sinks]) and torch.equal(read[:, :, -20:], keys[:, :, -20:])


def test_errors_are_within_half_a_step_and_bytes_are_counted() -> None:
    keys, values = states(4 + 64 + 32, dtype=torch.bfloat16), states(100, dtype=torch.bfloat16)
    cache = layer(kivi, bits=2, key_bits=2, group_size=32, affine_bits=16, fit=0)
    first = cache.update(keys, values)
    assert all(map(torch.equal, first, (keys, values))), "the prompt attends to its own exact states"
    read_keys, read_values = cache.read()
    middle = keys[:, :, 4:68].float().unflatten(2, (2, 32))
    step = (middle.amax(3, keepdim=True) - middle.amin(3, keepdim=True)) / 3
    error = (read_keys[:, :, 4:68].float().unflatten(2, (2, 32)) - middle).abs()
    assert (error <= 0.53 * step + 0.01 * middle.abs()).all()
    parts = values[:, :, 4:68].float().unflatten(3, (2, 32))
    step = (parts.amax(4, keepdim=True) - parts.amin(4, keepdim=True)) / 3
    assert ((read_values[:, :, 4:68].float().unflatten(3, (2, 32)) - parts).abs() <= 0.53 * step + 0.01 * parts.abs()).all()
    per_head = 64 * 64 * 2 // 8 + 2 * 64 * 2 * 2 + 64 * (16 + 8) + 36 * 64 * 2 * 2  # codes, affine, values, exact
    reference = (64 + 5) * 4  # a centre, four units, a flag
    assert cache.nbytes == 4 * (per_head + reference)


def test_a_long_prompt_leaves_no_dense_copy() -> None:
    cache = layer(kivi)
    cache.update(states(2000), states(2000))
    assert cache.reserved_nbytes < 0.1 * 2000 * 64 * 4 * 2 * 4


def test_strength_zero_is_kivi_and_one_block_corrects_nothing() -> None:
    keys, values = states(120), states(120)
    plain = streamed(layer(kivi), keys, values, [120])
    for options in ({"strength": 0.0}, {"block": 64}):
        other = streamed(layer(squat, metric(), **options), keys, values, [120])
        assert same(plain, other), options


def test_corrections_are_the_constrained_minimum() -> None:
    """Against the published form P_fc P_cc^{-1} with P = A^{-1}, and A's visiting order."""
    given = metric()
    given = 5 * given / given.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    order = visiting_order(given)
    moves = corrections(given, order, 16, cap=1e9)
    for head in range(2):
        full = torch.eye(64).double() + given[head].double()
        full = full[order[head]][:, order[head]]
        inverse = torch.linalg.inv(full)
        for index, move in enumerate(moves):
            stop = 16 * (index + 1)
            want = (inverse[stop:, :stop] @ torch.linalg.inv(inverse[:stop, :stop]))[:, -16:]
            assert torch.allclose(move[head].double(), want, atol=1e-5)
    assert len(moves) == 3 and moves[0].shape == (2, 48, 16)
    capped = corrections(given, order, 16, cap=0.01)
    assert max(float(move.abs().max()) for move in capped) <= 0.01 + 1e-6


def test_in_the_limit_the_error_is_orthogonal_to_the_queries() -> None:
    q = (torch.randn(2, 400, 6) @ torch.randn(2, 6, 64)).double()
    given = q.mT @ q
    order = visiting_order(given)
    basis = torch.linalg.eigh(given.double()).eigenvectors[..., -6:]
    move = corrections(1e7 * given, order, 8, cap=1e9)[0].double()
    for head in range(2):
        rows = basis[head][order[head]]
        error = torch.randn(8).double()
        whole = torch.cat([error, move[head] @ error])
        assert (rows.T @ whole).norm() < 1e-4 * (rows[:8].T @ error).norm()


def test_less_error_where_queries_look() -> None:
    """On queries that were not in the metric."""
    mix = torch.randn(1, 64, 64) * torch.logspace(0.5, -1.5, 64)[:, None]
    q, later = torch.randn(1, 500, 64) @ mix, torch.randn(1, 500, 64) @ mix
    keys = states(256, heads=1, batch=1)
    given = q.mT @ q
    given = 10 * given / given.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    order = visiting_order(given)
    errors = {}
    for block in (64, 32, 8):
        moves = torch.cat([torch.empty(1, 0), *(move.flatten(1) for move in corrections(given, order, block))], dim=1)
        packed, affine = pack_groups(keys, 2, 32, 64, torch.bfloat16, None, None, order[None], moves[None], block)
        read = torch.empty_like(keys)
        expand_groups(packed, affine, 2, 64, read)
        errors[block] = float(((read - keys)[0] @ later.mT).norm())
    assert errors[8] < errors[32] < errors[64] and errors[8] < 0.6 * errors[64], errors


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_generation_collects_the_queries_of_the_prompt(family: str) -> None:
    model = tiny_model(family)
    ids = prompt(2, 90)
    cache = KVCache(model, "squat", bits=8, group_size=16, window=8)
    dense = greedy(model, ids, compress.KVCache(model, bits=16), new=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="squat saw no queries")
        assert torch.equal(greedy(model, ids, cache, new=4), dense)
    packed = next(item for item in cache.layers if isinstance(item, squat.Layer))
    (store,) = packed.stores
    assert store.frozen and store.moves.rows().any() and store.key_codes.length > 3
    assert not store.metric.nbytes, "the corrections take the place of the metric"


@pytest.mark.parametrize("method", ["kivi", "squat"])
@pytest.mark.parametrize("cuts", [[70], [9, 30, 31]], ids=str)
def test_a_row_has_the_bytes_that_it_has_alone(method: str, cuts: list[int]) -> None:
    """Whatever the padding in front of it and whoever is beside it, prefilled at once or in chunks."""
    model, options = tiny_model("llama").double(), {"group_size": 16, "window": 8, "sink_tokens": 2}
    rows = [prompt(1, tokens) for tokens in (70, 51, 70, 58)]
    ids = torch.cat([torch.nn.functional.pad(row, (70 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(70) >= 70 - row.shape[1] for row in rows]).long()
    together = KVCache(model, method, **options)
    generated = greedy(model, ids, together, new=20, attention_mask=mask) if len(cuts) == 1 else None
    if generated is None:
        start = 0
        for part in ids.split(cuts, dim=1):
            start += part.shape[1]
            positions = (mask[:, :start].cumsum(1) - 1).clamp_min(0)[:, -part.shape[1] :]
            with torch.no_grad():
                model(part, attention_mask=mask[:, :start], position_ids=positions, past_key_values=together)
    for index, row in enumerate(rows):
        alone, padding = KVCache(model, method, **options), 70 - row.shape[1]
        if generated is not None:
            assert torch.equal(greedy(model, row, alone, new=20)[0], generated[index, padding:])
        else:
            with torch.no_grad():
                for part in row.split(
                    [cuts[0] - padding, *cuts[1:]] if padding < cuts[0] else [cuts[0] + cuts[1] - padding, cuts[2]], dim=1
                ):
                    model(part, past_key_values=alone)
        for one, two in zip(alone.layers, together.layers, strict=True):
            (store,) = one.stores
            other = next(store for store in two.stores if index in store.rows)
            assert other.padding == padding
            here = other.rows.tolist().index(index)
            for ours, theirs in zip(store.buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(ours.rows()[0], theirs.rows()[here], rtol=1e-3, atol=1e-5)
            read, theirs = one.read(), two.read()
            assert all((t[index, :, :padding] == 0).all() for t in theirs)
            torch.testing.assert_close(read[0][0], theirs[0][index, :, padding:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["kivi", "squat"])
def test_a_row_of_several_turns_has_the_bytes_that_it_has_alone(method: str) -> None:
    """Padding in front of a turn, behind it or in its middle, with tokens one by one between the turns."""
    model, options = tiny_model("llama").double(), {"group_size": 16, "window": 8, "sink_tokens": 2}
    turns = [
        ["..xxxxxxxxxxxxxxxxxxxxxxxxxxxx", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "..xxxxxxxxxxxxxxxxxxxxxxxxxxxx"],
        *[["x", "x", "x"]] * 3,
        ["xxxxxxxxxxxxxxxxxxxxxxxxx", ".........xxxxxxxxxxxxxxxx", "xxxxxxx..xxxxxx.........x"],
        *[["x", "x", "x"]] * 20,
        ["xxxxxxxxxxxxxx...", "xxxxxxxxxxxxxxxxx", ".....xxxxxxxxxxxx"],
    ]
    together, ids = KVCache(model, method, **options), [prompt(3, len(turn[0])) for turn in turns]
    alone = [KVCache(model, method, **options) for _ in range(3)]
    mask = torch.zeros(3, 0, dtype=torch.long)
    for turn, part in zip(turns, ids, strict=True):
        real = torch.tensor([[sign == "x" for sign in row] for row in turn])
        mask = torch.cat([mask, real.long()], dim=1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -part.shape[1] :]
        with torch.no_grad():
            model(part, attention_mask=mask, position_ids=positions, past_key_values=together)
            for row, cache in enumerate(alone):
                model(part[row][real[row]][None], past_key_values=cache)
    for row, cache in enumerate(alone):
        kept = mask[row].bool()
        for one, two in zip(cache.layers, together.layers, strict=True):
            (store,), other = one.stores, next(store for store in two.stores if row in store.rows)
            assert store.key_codes.length >= 3 and other.tokens == store.tokens and not store.gaps
            here = other.rows.tolist().index(row)
            for ours, theirs in zip(store.buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(ours.rows()[0], theirs.rows()[here], rtol=1e-3, atol=1e-5)
            for ours, theirs in zip(one.read(), two.read(), strict=True):
                torch.testing.assert_close(ours[0], theirs[row][:, kept], rtol=1e-3, atol=1e-4)
                assert (theirs[row][:, ~kept] == 0).all()
    first = together.layers[0]
    assert len(first.stores) == 3
    whole = first.read()
    first.crop(40 - first.length)  # into the second turn
    assert all(store.tokens == int(mask[row, :40].sum()) for store in first.stores for row in store.rows)
    for before, after in zip(whole, first.read(), strict=True):
        torch.testing.assert_close(after, before[:, :, :40])


def test_sixteen_bits_are_lossless() -> None:
    model, ids = tiny_model("llama"), prompt(2, 90)
    mask = torch.stack([torch.arange(90) >= 9, torch.arange(90) >= 0]).long()
    want = greedy(model, ids, DynamicCache(), attention_mask=mask)
    for method in ("kivi", "squat"):
        cache = KVCache(model, method, bits=16)
        assert torch.equal(greedy(model, ids, cache, attention_mask=mask), want)
        assert not cache.packed_bits_per_element
    with pytest.raises(CompressError, match="leave out key_bits"):
        KVCache(model, "squat", bits=16, key_bits=4)


def test_a_number_that_is_none_stays_where_it_is() -> None:
    """A NaN in one channel of one token is not turned into a number, and leaves other channels and groups alone."""
    keys, values, given = states(80), states(80), metric()
    keys[0, 1, 30, 5] = torch.nan
    for method in (kivi, squat):
        read = streamed(layer(method, given, window=8, group_size=16), keys, values, [80]).read()[0]
        bad = read.isnan()
        assert bad[0, 1, 30, 5] and bad[0, 1, 20:36].any() and not bad[1].any() and not bad[:, 0].any()
        assert not bad[0, 1, :20].any() and not bad[0, 1, 36:].any()


def test_corrections_of_a_given_metric_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given, keys, calls = metric(), states(40), []
    solve = squat.corrections
    monkeypatch.setattr(squat, "corrections", lambda *args: calls.append(1) or solve(*args))
    first, second = (streamed(layer(squat, given, window=8, group_size=16), keys, keys, [40]) for _ in range(2))
    assert len(calls) == 1 and same(first, second)
    streamed(layer(squat, given, window=8, group_size=16, strength=1.0), keys, keys, [40])
    given *= (unequal := torch.rand(64)) * unequal[:, None]
    third = streamed(layer(squat, given, window=8, group_size=16), keys, keys, [40])
    assert len(calls) == 3 and not torch.equal(third.read()[0], first.read()[0])


def test_beams_of_padded_rows() -> None:
    model, ids = tiny_model("llama"), prompt(2, 60)
    mask = torch.stack([torch.arange(60) >= 9, torch.arange(60) >= 0]).long()
    search = {"num_beams": 3, "new": 12, "attention_mask": mask}
    want = greedy(model, ids, compress.KVCache(model, bits=16), **search)
    cache = KVCache(model, "squat", bits=8, window=8, group_size=8)
    assert torch.equal(greedy(model, ids, cache, **search), want)
    (first, *_) = cache.layers
    assert sorted(store.padding for store in first.stores) == [0, 9]
    assert sorted(torch.cat([store.rows for store in first.stores]).tolist()) == list(range(6))
    first.batch_select_indices(torch.tensor([False, True, True, False, False, True]))
    assert first.read()[0].shape[0] == 3
    first.batch_repeat_interleave(2)
    assert first.read()[0].shape[0] == 6 and torch.equal(first.read()[0][0], first.read()[0][1])
    first.crop(-(first.length - 5))
    assert first.read()[0].shape[2] == 5 and all(store.padding <= 5 for store in first.stores)


def test_without_queries_it_is_kivi_and_says_so() -> None:
    model = tiny_model("llama")
    cache = KVCache(model.config, "squat", group_size=16, window=8)
    with pytest.warns(UserWarning, match="saw no queries"):
        model(prompt(1, 60), past_key_values=cache)


def test_cropping_into_a_group_keeps_what_it_read() -> None:
    keys, values = states(120), states(120)
    cache = streamed(layer(kivi, bits=4), keys, values, [120])
    before = cache.read()
    cache.crop(-70)
    assert cache.get_seq_length() == 50 and all(
        torch.equal(now, then[:, :, :50]) for now, then in zip(cache.read(), before, strict=True)
    )
    cache.crop(-48)
    assert torch.equal(cache.read()[0], keys[:, :, :2])
    cache.update(keys[:, :, 2:], values[:, :, 2:])
    assert torch.equal(cache.read()[0], before[0])


def test_beams_and_copies() -> None:
    keys, values = states(100), states(100)
    cache = streamed(layer(squat, metric()), keys, values, [100])
    fork = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.read()[0][0], fork.read()[0][1])
    more = states(80)
    cache.update(more[:, :, :40], more[:, :, :40])
    fork.update(more[:, :, :40], more[:, :, :40])
    assert torch.equal(cache.read()[0][1], fork.read()[0][1])
    cache.batch_repeat_interleave(2)
    assert cache.read()[0].shape[0] == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: KVCache(model, "kivi", bits=9), "bits: expected 2 to 8"),
        (lambda model: KVCache(model, "kivi", group_size=12), "multiple of 8"),
        (lambda model: KVCache(model, "per_token", metrics={0: metric()}), "takes no metrics; squat does"),
        (lambda model: KVCache(model, "kivi", key_bases={0: torch.eye(16)}), "take no bases"),
        (lambda model: KVCache(model, "squat", metrics={0: metric()}), r"is \[2, 16, 16\], got \[2, 64, 64\]"),
        (lambda model: KVCache(model, "squat", block=5), "block 5 does not divide the head_dim of 16"),
    ],
)
def test_mistakes_are_named(build: Any, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(CompressError, match=message):
        model(prompt(1, 4), past_key_values=build(model))


def biased(scale: float, slow: bool) -> torch.nn.Module:
    """Qwen2 with key biases far larger than what varies: in every channel, or in those that turn slowly alone."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        for block in model.model.layers:
            pairs = block.self_attn.k_proj.bias.view(2, 2, 8)  # heads, members of a pair, pairs from fast to slow
            chosen = pairs[..., 6:] if slow else pairs
            chosen.copy_(scale * torch.randn_like(chosen))
    return model


def decoded_error(model: torch.nn.Module, cache: KVCache, ids: Tensor, mask: Tensor | None = None) -> float:
    """Relative error of the logits of 20 decoded tokens, against an exact cache."""
    outputs = []
    for each in (cache, KVCache(model, bits=16)):
        with torch.inference_mode():
            given = {} if mask is None else {"attention_mask": mask[:, :100]}
            model(ids[:, :100], past_key_values=each, **given)
            steps = []
            for at in range(100, 120):
                given = {} if mask is None else {"attention_mask": mask[:, : at + 1]}
                steps.append(model(ids[:, at : at + 1], past_key_values=each, **given).logits)
            outputs.append(torch.cat(steps, dim=1))
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


@pytest.mark.parametrize("method", ["kivi", "squat"])
@pytest.mark.parametrize("slow", [True, False])
def test_huge_key_biases_do_not_collapse_it(method: str, slow: bool) -> None:
    """A scale per channel takes in biases that hardly turn, one per token does not; the wave of those that turn is known."""
    model, ids, few = biased(100, slow), prompt(2, 120), {"key_bits": 4, "value_bits": 8}  # biases are the keys'
    options = few | {"window": 8, "group_size": 16}
    error = decoded_error(model, KVCache(model, method, **options), ids)
    assert error < 0.1 and error < 0.3 * decoded_error(model, KVCache(model, **few), ids)
    blind = KVCache(model, method, **options)
    for layer in blind.layers:
        layer.wave = None
    assert slow or error < 0.2 * decoded_error(model, blind, ids)


def test_a_wave_that_is_not_the_keys_is_left_alone() -> None:
    """Positions that count backwards: the first group shows that the wave does not fit, and nothing is lost by it."""
    model, ids = biased(30, slow=False), prompt(1, 90)
    caches = [KVCache(model, "kivi", bits=8, window=8, group_size=16) for _ in range(2)]
    for layer in caches[1].layers:
        layer.wave = None
    with torch.no_grad():
        for cache in caches:
            model(ids, position_ids=torch.arange(400, 310, -1)[None], past_key_values=cache)
    for one, two in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.wave is not None and torch.equal(one.read()[0], two.read()[0])


def test_a_wave_is_taken_off_where_rows_begin() -> None:
    """Beside a neighbour without padding, cropped into a group, and from a file."""
    model, ids = biased(100, slow=False).double(), prompt(2, 120)
    mask = torch.stack([torch.arange(120) >= 30, torch.arange(120) >= 0]).long()
    options = {"bits": 6, "window": 8, "group_size": 16}
    cache, alone = (KVCache(model, "kivi", **options) for _ in range(2))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(ids[:, :100], attention_mask=mask[:, :100], position_ids=positions[:, :100], past_key_values=cache)
        model(ids[:1, 30:100], past_key_values=alone)
    for one, two in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.read()[0][:1, :, 30:], two.read()[0], rtol=1e-4, atol=1e-3)
        assert all((store.reference.rows()[..., -1] == 1).all() for store in one.stores)
        before = one.read()[0]
        one.crop(-40)
        assert torch.equal(one.read()[0], before[:, :, :60])


@pytest.mark.parametrize("method", ["kivi", "squat"])
@pytest.mark.parametrize(
    "search", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"assisted": True}], ids=str
)
def test_searches_run_on_it(method: str, search: dict[str, Any]) -> None:
    """At 8 bits they find what they find in a dense cache."""
    model, ids = tiny_model("llama"), prompt(1, 60)
    search = dict(search)
    if search.pop("assisted", False):
        search["assistant_model"] = tiny_model("llama", seed=1)
    want = greedy(model, ids, compress.KVCache(model, bits=16), new=8, **search)
    got = greedy(model, ids, KVCache(model, method, bits=8, window=8, group_size=8), new=8, **search)
    assert torch.equal(got, want)


def test_what_is_stored_corrects_as_what_was_computed() -> None:
    """Eight bits of a correction are enough: the error that queries see stays where it was."""
    given, keys = metric(), states(60)
    cache = layer(squat, window=8, group_size=16)
    cache.watched = True
    cache.update(keys, keys)
    (store,) = cache.stores
    store.metric.rows()[:, :, 0] = given.flatten(1)
    store.flush()
    weighted = 10 * given / given.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    order, moves = store._corrections()
    assert torch.equal(order[0], visiting_order(weighted))
    want = torch.cat([move.flatten(1) for move in corrections(weighted, order[0], 8)], dim=1)
    assert (moves[0] - want).abs().max() <= 1.01 * want.abs().max() / 254
    assert sum(rows.nbytes for rows in (store.metric, store.order, store.moves)) == 2 * 2 * (64 * 56 // 2 + 65 * 4)
    shared = streamed(layer(squat, given, window=8, group_size=16), keys, keys, [60])
    assert cache.nbytes - shared.nbytes == 2 * 2 * (64 * 56 // 2 + 65 * 4), "a given metric is not the conversation's"
    assert (shared.read()[0] - cache.read()[0]).abs().mean() < 0.02 * keys.abs().mean()


@pytest.mark.parametrize("method", [kivi, squat])
def test_tokens_that_are_alike_may_come_at_once(method: Any) -> None:
    """What one call of `alike` tokens reads is what each of them reads alone."""
    keys, values, given = states(200), states(200), metric()
    options = {"sink_tokens": 4, "window": 20, "group_size": 16}
    whole, single = (layer(method, given, **options) for _ in range(2))
    for cache in (whole, single):
        cache.update(keys[:, :, :30], values[:, :, :30])
    at, calls = 30, 0
    while at < 200:
        count = min(whole.alike(), 200 - at)
        together = whole.update(keys[:, :, at : at + count], values[:, :, at : at + count])
        for index in range(count):
            step = slice(at + index, at + index + 1)
            alone = single.update(keys[:, :, step], values[:, :, step])
            assert all(torch.equal(a, b[:, :, : at + index + 1]) for a, b in zip(alone, together, strict=True))
        at, calls = at + count, calls + 1
    assert calls <= 2 * ((200 - 30) // 16 + 1), "the token that packs a group comes alone"


@pytest.mark.parametrize(
    ("width", "group"), [(16, 16), (64, 32), (80, 16), (96, 32), (112, 16), (120, 24), (256, 32), (20, 20)]
)
def test_heads_of_any_width(width: int, group: int) -> None:
    """Values share a scale along as many channels as divide the head; one KV head for all queries (MQA)."""
    model, ids = tiny_model("llama", head_dim=width, num_key_value_heads=1), prompt(2, 60)
    options = {"bits": 8, "window": 8, "group_size": 16, "block": 4}
    cache = KVCache(model, "squat", **options)
    assert decoded_error(model, cache, torch.cat([ids, ids], dim=1)) < 0.05
    assert cache.layers[0].stores[0].value_group == group


def test_attention_that_cannot_be_seen_is_left_alone() -> None:
    """Transformers loads flash attention and hub kernels by name, so a function of another name must not stand in front."""
    model = tiny_model("llama")
    own, model.config._attn_implementation = model.config._attn_implementation, "flash_attention_2"
    cache = KVCache(model, "squat", group_size=16, window=8)
    assert model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = own
    with pytest.warns(UserWarning, match="saw no queries"), torch.no_grad():
        model(prompt(1, 60), past_key_values=cache)


def test_a_cache_learns_from_its_own_attention_alone() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    cache = KVCache(model, "squat", group_size=16, window=8)
    cache.layers[2].update(*[states(20, head_dim=16)] * 2)  # by hand: no attention follows
    KVCache(other, "squat")
    with torch.no_grad():
        other(prompt(2, 20), past_key_values=DynamicCache(config=other.config))
        other(prompt(2, 7), past_key_values=KVCache(other, "squat"))
    assert not cache.layers[2].moment().any()
    cache.layers[0].update(*[states(20, head_dim=16)] * 2)
    with torch.no_grad():  # the same layer of a model, as many rows and heads, but other keys
        other(prompt(2, 21), past_key_values=DynamicCache(config=other.config))
    assert not cache.layers[0].moment().any()


def test_a_layer_that_was_sent_away_packs_and_goes_back() -> None:
    """An offloading cache sends a layer to the CPU between its update and its attention."""
    model, ids = tiny_model("llama"), prompt(2, 90)
    plain, away = (KVCache(model, "squat", group_size=16, window=8) for _ in range(2))
    for layer in away.layers:
        update = layer.update

        def sent(*args: Any, update: Any = update, layer: Any = layer, **kwargs: Any) -> Any:
            states = update(*args, **kwargs)
            layer.offload()
            return states

        layer.update = sent
    with torch.no_grad():
        for cache in (plain, away):
            model(ids, past_key_values=cache)
    assert all(layer.away for layer in away.layers) and not any(layer.away for layer in plain.layers)
    assert all(map(same, plain.layers, away.layers))


def test_long_prompts_are_packed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values, given = states(400), states(400), metric()
    whole = streamed(layer(squat, given, group_size=16), keys, values, [400])
    monkeypatch.setattr("compress.cache.groups._SLICE", 32)
    assert same(whole, streamed(layer(squat, given, group_size=16), keys, values, [400]))


def test_what_is_cropped_away_decides_nothing() -> None:
    keys, values = states(200), states(200)
    options = {"group_size": 16, "window": 8}
    for length in (0, 4):  # nothing, and the sinks
        cache = streamed(layer(kivi, **options), 100 * keys, values, [200])
        cache.crop(-(200 - length))
        cache.update(keys[:, :, length:], values[:, :, length:])
        fresh = layer(kivi, **options)
        fresh.update(torch.cat([100 * keys[:, :, :length], keys[:, :, length:]], dim=2), values)
        assert same(cache, fresh)


def test_what_reading_needs_must_be_there_again(tmp_path: Any) -> None:
    file, options = tmp_path / "prefix", {"group_size": 16, "window": 8}
    model = biased(100, slow=False)
    caches = {
        "wave": KVCache(model, "kivi", **options),
        "metrics": KVCache(model, "squat", metrics=query_moments(model, prompt())),
    }
    for cache in caches.values():
        with torch.no_grad():
            model(prompt(1, 90), past_key_values=cache)
    caches["wave"].save(file)
    with pytest.raises(CompressError, match="key biases taken off; make the cache from the model"):
        KVCache(model.config, "kivi", **options).load(file)
    caches["metrics"].save(file)
    with pytest.raises(CompressError, match="saved by a cache with metrics"):
        KVCache(model, "squat").load(file)
    empty = KVCache(model, "kivi")
    empty.batch_repeat_interleave(2)
    assert empty.get_seq_length() == 0


def test_gain_and_offset_of_a_norm() -> None:
    layer_norm, rms_norm = torch.nn.LayerNorm(8), tiny_model("gemma2").model.norm
    for tensor in layer_norm.parameters():
        torch.nn.init.normal_(tensor)
    gain, offset = _affine(layer_norm)
    assert torch.allclose(gain, layer_norm.weight.double(), atol=1e-4) and torch.equal(offset, layer_norm.bias.double())
    gain, offset = _affine(rms_norm)
    assert torch.allclose(gain, 1 + rms_norm.weight.double(), atol=1e-4) and not offset.any()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "stablelm"])
def test_weights_alone_tell_where_queries_look(family: str) -> None:
    """Against the moments of random tokens; the rotation of a position is that of the model."""
    model = tiny_model(family)
    with torch.no_grad():
        for block in model.model.layers:
            weight, norm = block.self_attn.q_proj.weight, block.input_layernorm.weight
            width = block.self_attn.head_dim
            weight.mul_(torch.logspace(0.7, -0.7, width).repeat(len(weight) // width)[:, None])
            norm.copy_(torch.rand(len(norm)) + (0 if family == "gemma2" else 1))
    found, want = weight_moments(model), query_moments(model, torch.randint(3, 256, (8, 300)))
    blind = torch.eye(width).expand(next(iter(want.values())).shape)
    for index, moment in want.items():
        likeness, of_nothing = (
            float(torch.nn.functional.cosine_similarity(other.flatten(1), moment.flatten(1)).min())
            for other in (found[index], blind)
        )
        assert likeness > 0.8 and likeness > of_nothing + 0.05, (index, likeness, of_nothing)
    with torch.no_grad():
        model(prompt(1, 90), past_key_values=KVCache(model, "squat", window=8, group_size=8, metrics=found))
