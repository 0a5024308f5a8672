"""SVD-LLM: the truncation error is the theoretical one."""

from __future__ import annotations

import pytest
import torch

from compress.layers import build
from compress.linalg import SecondMoment, whitening
from compress.methods import Site, svd_llm


def test_error_is_the_tail_of_the_whitened_spectrum() -> None:
    x = torch.randn(2000, 40) * torch.logspace(1, -1, 40)
    gram, weight = (x.T @ x / 2000).double(), torch.randn(56, 40)
    config = svd_llm.Config(ratio=0.4, damping=0)
    spec = {**svd_llm.plan(Site(40, 56), config), "in_features": 40, "out_features": 56, "bias": False}
    layer = build(spec)
    layer.load_state_dict(svd_llm.compress(weight, SecondMoment(gram), spec, config))
    values = torch.linalg.svdvals(whitening(gram, 0)[0] @ weight.double().T).square()
    expected = float((values[spec["rank"] :].sum() / values.sum()).sqrt())
    assert SecondMoment(gram).relative_error(weight, layer.dense_weight()) == pytest.approx(
        expected, rel=5e-3
    )  # bf16 factors
