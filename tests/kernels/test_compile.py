"""Layers under torch.compile: one graph without a break, the same numbers, one compilation for any number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress.layers import build
from compress.methods import Site, load
from compress.recipe import Recipe

FORMS = {
    "gptq-w4": [],
    "resq": [],
    "resq-plus": [],
    "cospadi-20": ["weights.dictionary=identity"],
    "cospadi-40-learned": [],
    "cospadi-75": ["weights.value_bits=4"],
    "svd-llm-20": [],
}


def layer_of(form: str) -> nn.Module:
    """A layer of 64 inputs and 96 outputs as a recipe plans it, filled by its method."""
    from compress.blockwise import filled_layer
    from compress.linalg import SecondMoment

    rule = Recipe.load(form, FORMS[form]).weights[0]
    method = load(rule.method)
    spec: dict[str, Any] = {
        **method.plan(Site(64, 96, "stream"), rule.options), "in_features": 64, "out_features": 96, "bias": False
    }  # fmt: skip
    x = torch.randn(500, 64)
    tensors = method.compress(torch.randn(96, 64), SecondMoment(x.T @ x / 500), spec, rule.options)
    build(spec)
    return filled_layer(spec, tensors, torch.device("cpu")).eval()


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_one_graph(form: str) -> None:
    layer, graphs = layer_of(form), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    fast = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        fast(torch.randn(1, 2, 64))
        first = len(graphs)
        for tokens in (2, 5, 40):
            x = torch.randn(1, tokens, 64)
            # few tokens meet a C++ kernel outside of a graph, in 15 bits, and the same kernel or the reference within one
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-3, atol=1e-2)
    assert len(graphs) == first
