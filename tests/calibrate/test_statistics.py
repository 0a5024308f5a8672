"""Gram matrices: equal to the definition, whatever the batching; padding is left out."""

from __future__ import annotations

import pytest
import torch

from compress.calibrate.statistics import Gram


def test_equals_the_definition_and_merges() -> None:
    x = torch.randn(3, 40, 700)  # wider than one block of columns
    whole, first, second = Gram(700), Gram(700), Gram(700)
    whole.add(x)
    first.add(x[:1])
    second.add(x[1:])
    first.merge(second)
    flat = x.reshape(-1, 700).double()
    expected = flat.T @ flat / 120
    assert torch.allclose(whole.mean(), expected, atol=1e-5)
    assert torch.allclose(first.mean(), whole.mean(), atol=1e-5)
    assert torch.equal(whole.mean(), whole.mean().T)


def test_padding_does_not_count() -> None:
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded, real = Gram(4), Gram(4)
    padded.add(x, mask)
    real.add(x[mask.bool()])
    assert padded.tokens == 8
    assert torch.equal(padded.mean(), real.mean())


def test_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        Gram(4).mean()
