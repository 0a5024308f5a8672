"""Attention over packed groups: the C++ kernel against the reference, and the reference against multiplying out."""

from __future__ import annotations

import pytest
import torch

from cache_helpers import packed_groups
from compress.kernels import cpu
from compress.kernels.affine_groups import EIGHT_BITS, expand_groups_reference
from compress.kernels.group_attention import (
    group_scores,
    group_scores_reference,
    group_sums,
    group_sums_reference,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # fp32 sums in another order


@pytest.mark.parametrize("kind", [torch.bfloat16, EIGHT_BITS])
@pytest.mark.parametrize("queries", [1, 3, 4, 9])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("tokens", "runs", "run"), [(64, 64, 1), (8, 128, 1), (16, 8, 1), (1, 4, 16), (8, 3, 8)])
def test_scores(bits: int, queries: int, tokens: int, runs: int, run: int, kind: torch.dtype) -> None:
    rows, width = 5, runs * run
    packed, affine, units = packed_groups(bits, rows, tokens, runs, run, kind)
    query, centre = torch.randn(2, 3, queries, width), torch.randn(2, 3, width)
    keys = torch.empty(2, 3, rows * tokens, width)
    expand_groups_reference(packed, affine, bits, runs, keys, units, centre)
    want = query @ keys.mT
    torch.testing.assert_close(group_scores_reference(query, packed, affine, bits, runs, units, centre), want, **CLOSE)
    if cpu.compiled() is not None:
        got = cpu.group_scores(query, packed, affine, bits, runs, units, centre)
        scale = want.abs().mean()
        torch.testing.assert_close(got / scale, want / scale, **CLOSE)
    torch.testing.assert_close(group_scores(query, packed, affine, bits, runs, units, centre), want, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", [torch.bfloat16, EIGHT_BITS])
@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "runs", "run"), [(1, 2, 32), (16, 1, 80), (77, 8, 32), (130, 16, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_sums(bits: int, queries: int, rows: int, runs: int, run: int, kind: torch.dtype, threads: int) -> None:
    width = runs * run
    packed, affine, units = packed_groups(bits, rows, 1, runs, run, kind)
    weights, values = torch.rand(2, 3, queries, rows), torch.empty(2, 3, rows, width)
    expand_groups_reference(packed, affine, bits, runs, values, units)
    want = weights @ values
    torch.testing.assert_close(group_sums_reference(weights, packed, affine, bits, runs, width, units), want, **CLOSE)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if cpu.compiled() is not None:
            got = cpu.group_sums(weights, packed, affine, bits, runs, width, units)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    finally:
        torch.set_num_threads(before)


def test_what_the_kernel_does_not_know_runs_the_reference() -> None:
    """Widths that are no multiple of 8, fp16 scales, fp64 queries."""
    packed, affine, _ = packed_groups(4, 3, 2, 12, 1, torch.float16)
    query = torch.randn(2, 3, 2, 12)
    want = group_scores_reference(query, packed, affine, 4, 12)
    assert torch.equal(group_scores(query, packed, affine, 4, 12), want)
    assert torch.equal(group_scores(query.double(), packed, affine, 4, 12), want)
    weights = torch.rand(2, 3, 2, 3)
    packed, affine, _ = packed_groups(4, 3, 1, 3, 4, torch.bfloat16)
    want = group_sums_reference(weights, packed, affine, 4, 3, 12)
    assert torch.equal(group_sums(weights, packed, affine, 4, 3, 12), want)
