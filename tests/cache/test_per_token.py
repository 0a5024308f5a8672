"""One packed layer: bytes, growth, streaming, bases, and what generation does to a layer besides appending."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from cache_helpers import new_layer, orthonormal, same, states, stored
from compress.cache import per_token as method


@pytest.mark.parametrize("head_dim", [16, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_back_in_the_dtype_of_the_states(head_dim: int, dtype: torch.dtype) -> None:
    layer = new_layer(bits=8, high_channels=8, sink_tokens=1)
    keys, values = states(7, 1, head_dim, dtype=dtype), states(7, 1, head_dim, dtype=dtype)
    for came, read in zip((keys, values), layer.update(keys, values), strict=True):
        assert read.dtype == dtype and read.shape == came.shape
        assert torch.equal(read[:, :, :1], came[:, :, :1]), "sinks are exact"
        step = (came.float().amax(-1, keepdim=True) - came.float().amin(-1, keepdim=True)) / 255
        assert ((read - came).float().abs() <= 0.55 * step + came.abs().float() * torch.finfo(dtype).eps).all()


def test_bytes_are_what_the_docstring_says() -> None:
    layer = new_layer(bits=4, high_bits=8, high_channels=8, capacity=20)
    layer.update(states(11), states(11))
    tokens_and_heads = 2 * 2 * 11 * 2  # batch, heads, tokens, keys and values
    assert layer.nbytes == 44 * tokens_and_heads and layer.bits_per_element == 44 * 8 / 64
    assert layer.reserved_nbytes == 44 * 2 * 2 * 9 * 2
    layer = new_layer(bits=4, value_bits=16, sink_tokens=3)
    layer.update(states(11, dtype=torch.bfloat16), states(11, dtype=torch.bfloat16))
    assert layer.nbytes == 4 * (3 * 128 + 8 * 36 + 11 * 128)


def test_appending_moves_nothing_but_at_doubling() -> None:
    layer = new_layer(bits=4)
    layer.update(states(20), states(20))
    places = []
    for _ in range(60):
        before = [rows.clone() for rows in stored(layer)]
        layer.update(states(1), states(1))
        places.append(layer.key_side.codes.data.data_ptr())
        assert all(torch.equal(rows[:, :, : old.shape[2]], old) for rows, old in zip(stored(layer), before, strict=True))
    assert len(set(places)) == 2 and layer.key_side.codes.data.shape[2] == 80  # 20, 40, 80


@pytest.mark.parametrize("basis", [None, (64,), (2, 64)], ids=str)
@pytest.mark.parametrize("sinks", [0, 5])
def test_streamed_codes_are_one_shot_codes(basis: tuple[int, ...] | None, sinks: int) -> None:
    bases = (orthonormal(*basis), orthonormal(*basis)) if basis else (None, None)
    options = {"bits": 4, "high_channels": 8, "sink_tokens": sinks}
    whole, single, chunked = (new_layer(bases, **options) for _ in range(3))
    keys, values = states(300), states(300)
    whole.update(keys, values)
    for start in range(300):
        single.update(keys[:, :, start : start + 1], values[:, :, start : start + 1])
    for chunk in zip(keys.split([3, 97, 1, 199], dim=2), values.split([3, 97, 1, 199], dim=2), strict=True):
        read = chunked.update(*chunk)
    assert same(whole, single) and same(whole, chunked)
    torch.testing.assert_close(read, single.read(), rtol=0, atol=1e-5)


def test_rotated_states_do_not_depend_on_their_neighbours() -> None:
    basis, keys = orthonormal(64), states(200)  # in fp32 most of them do, in the last bit
    alone = [method._rotate(keys[:, :, t : t + 1], basis) for t in range(200)]
    assert torch.equal(torch.cat(alone, dim=2), method._rotate(keys, basis))


def test_long_reads_are_put_together_from_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = orthonormal(64)
    whole, sliced = (new_layer((basis, None), bits=5, sink_tokens=3) for _ in range(2))
    keys, values = states(50), states(50)
    expected = whole.update(keys, values)
    monkeypatch.setattr(method, "_CHUNK", 7)
    torch.testing.assert_close(sliced.update(keys, values), expected, rtol=0, atol=1e-5)
    assert same(whole, sliced) and sliced.reserved_nbytes == whole.reserved_nbytes == 0


def test_a_basis_moves_an_outlier_direction_into_the_high_part() -> None:
    basis = orthonormal(64)
    keys = states(100) + 50 * torch.randn(2, 2, 100, 1) * basis[:, -1]
    values = states(100)

    def error(key_basis: Tensor | None) -> float:
        read, _ = new_layer((key_basis, None), bits=4, high_channels=8).update(keys, values)
        return float((read - keys).norm() / keys.norm())

    assert error(basis) < 0.4 * error(None) and error(basis) < 0.4 * error(orthonormal(64))  # 0.025, 0.074, 0.081


def test_crop_leaves_no_trace() -> None:
    for sinks in (0, 4):
        cropped, never = (new_layer(bits=3, sink_tokens=sinks) for _ in range(2))
        keys, values = states(30), states(30)
        never.update(keys[:, :, :9], values[:, :, :9])
        cropped.update(keys, values)
        cropped.crop(0)
        assert cropped.get_seq_length() == 30
        cropped.crop(-21)
        assert same(cropped, never)
        again = cropped.update(keys[:, :, 9:], values[:, :, 9:])
        assert all(map(torch.equal, again, never.update(keys[:, :, 9:], values[:, :, 9:])))
        cropped.crop(-27)  # into the sinks
        assert cropped.get_seq_length() == 3 and [b.length for b in cropped.key_side.buffers][:2] == (
            [3, 0] if sinks else [0, 3]
        )
        cropped.crop(-99)
        assert cropped.get_seq_length() == 0 and cropped.nbytes == 0
    with pytest.raises(ValueError, match="negative"):
        cropped.crop(3)


def test_batch_operations_act_on_rows() -> None:
    layer = new_layer(bits=4, high_channels=8, sink_tokens=2)
    keys, values = states(9, batch=3), states(9, batch=3)
    read = layer.update(keys, values)
    layer.batch_repeat_interleave(2)
    assert all(torch.equal(now, old.repeat_interleave(2, dim=0)) for now, old in zip(layer.read(), read, strict=True))
    layer.batch_select_indices(torch.tensor([0, 2, 4]))
    assert all(map(torch.equal, layer.read(), read))
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert all(torch.equal(now, old[[2, 2, 0]]) for now, old in zip(layer.read(), read, strict=True))
    layer.batch_select_indices(torch.tensor([True, False, True]))
    alone = new_layer(bits=4, high_channels=8, sink_tokens=2)
    alone.update(keys[[2, 0]], values[[2, 0]])
    assert same(layer, alone)


def test_copies_reset_and_moves() -> None:
    layer = new_layer((orthonormal(64), None), bits=4)
    keys, values = states(9), states(9)
    read = layer.update(keys, values)
    fork = copy.deepcopy(layer)
    fork.update(keys, values)
    fork.crop(-12)
    fork.update(keys, values)
    assert layer.length == 9 and all(map(torch.equal, layer.read(), read))
    layer.offload()
    layer.prefetch()
    assert all(map(torch.equal, layer.read(), read))
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == layer.reserved_nbytes == 0 and not layer.is_initialized
    assert layer.update(states(1, batch=5), states(1, batch=5))[0].shape == (5, 2, 1, 64)


def test_inference_mode_and_gradients() -> None:
    layer = new_layer(bits=16, key_bits=4)
    with torch.inference_mode():
        layer.update(states(4), states(4))
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.offload()
    with torch.no_grad():
        layer.update(states(1), states(1))
    for _ in range(2):
        keys, values = layer.update(states(1).requires_grad_(), states(1).requires_grad_())
    assert not keys.requires_grad and not values.requires_grad and layer.length == 7


def test_a_prompt_may_attend_to_its_exact_states() -> None:
    layer = new_layer(bits=2, exact_prefill=True)
    keys, values = states(9), states(9)
    assert layer.update(keys, values)[0] is keys
    read, _ = layer.update(states(1), states(1))
    reference = new_layer(bits=2)
    assert torch.equal(read[:, :, :9], reference.update(keys, values)[0])


def test_another_batch_is_refused_not_broadcast() -> None:
    layer = new_layer()
    layer.update(states(3), states(3))
    with pytest.raises(ValueError, match=r"\[2, 2, new tokens, 64\], got \[1, 2, 1, 64\]"):
        layer.update(states(1, batch=1), states(1, batch=1))
