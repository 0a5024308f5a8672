"""Rounded, corrected and packed in one op: the reference against its parts, and what has no kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cache_helpers import states
from compress.cache import read_config
from compress.kernels import gpu_packing
from compress.kernels.affine_groups import EIGHT_BITS, expand_groups_reference
from compress.kernels.group_packing import behind, pack_groups, pack_groups_cuda, pack_groups_reference
from compress.kernels.rounding import Grid, quantize


def metric(batch: int, heads: int, width: int, block: int) -> tuple[Tensor, Tensor]:
    """Some order, and corrections that move something."""
    count = sum(size * block for size in behind(width, block))
    return torch.rand(batch, heads, width).argsort(dim=-1), 0.3 * torch.randn(batch, heads, count)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, EIGHT_BITS])
@pytest.mark.parametrize(("tokens", "runs", "run"), [(16, 20, 1), (1, 2, 24), (1, 1, 20)])
def test_what_is_read_is_what_was_rounded(bits: int, kind: torch.dtype, tokens: int, runs: int, run: int) -> None:
    x, width = states(3 * tokens, heads=3, head_dim=runs * run), runs * run
    units = torch.rand(2, 3, 2) + 0.1 if kind == EIGHT_BITS else None
    centre = torch.randn(2, 3, width)
    packed, affine = pack_groups(x, bits, tokens, runs, kind, units, centre, fit=2)
    read = torch.empty_like(x)
    expand_groups_reference(packed, affine, bits, runs, read, units, centre)
    for b, h, row, r in ((0, 0, 0, 0), (1, 2, 2, runs - 1)):
        part = (slice(row * tokens, (row + 1) * tokens), slice(r * run, (r + 1) * run))
        numbers = (x[b, h] - centre[b, h])[part].flatten()
        grid = Grid(kind, *(() if units is None else units[b, h]))
        want = quantize(numbers, bits, grid, 2).values.view(tokens, run) + centre[b, h, part[1]]
        torch.testing.assert_close(read[b, h][part], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_every_block_is_moved_by_the_errors_before_it(shared: bool) -> None:
    """Channel by channel, from the definition."""
    x, (order, moves) = states(16, head_dim=12), metric(1 if shared else 2, 2, 12, 4)
    packed, affine = pack_groups(x, 3, 16, 12, torch.bfloat16, None, None, order, moves, 4)
    read = torch.empty_like(x)
    expand_groups_reference(packed, affine, 3, 12, read)
    for b in range(2):
        for h in range(2):
            visit, flat = order[0 if shared else b, h], moves[0 if shared else b, h]
            first, second = flat[: 8 * 4].view(8, 4), flat[8 * 4 :].view(4, 4)
            left, errors = x[b, h][:, visit].double(), []
            for start in (0, 4, 8):
                part = quantize(left[:, start : start + 4].T.float(), 3, Grid(torch.bfloat16)).values.T
                torch.testing.assert_close(read[b, h][:, visit[start : start + 4]], part, rtol=1e-5, atol=1e-5)
                errors.append(part - left[:, start : start + 4])
                if start == 0:
                    left[:, 4:] += errors[0] @ first.double().T
                if start == 4:
                    left[:, 8:] += errors[1] @ second.double().T


@pytest.mark.parametrize(
    "arguments",
    [
        (3, 16, 16, torch.bfloat16),
        (2, 16, 16, EIGHT_BITS, torch.ones(2, 2, 2), torch.zeros(2, 2, 16), *metric(1, 2, 16, 4), 4, 2),
        (8, 1, 2, torch.float16),
    ],
    ids=["keys", "compensated", "values"],
)
def test_it_is_an_op(arguments: tuple) -> None:
    torch.library.opcheck(pack_groups, (torch.randn(2, 2, 32, 16), *arguments))


def test_what_has_no_kernel_runs_the_reference_and_says_so() -> None:
    x, (order, moves) = states(256, head_dim=8), metric(2, 2, 8, 2)
    given = (x, 2, 256, 8, torch.bfloat16, None, None, order, moves, 2)
    with pytest.warns(UserWarning, match="groups of 256 numbers, compensated"):
        found = pack_groups_cuda(*given)
    assert all(map(torch.equal, found, pack_groups_reference(*given)))


def test_the_defaults_have_a_kernel() -> None:
    for method in ("kivi", "squat"):
        config = read_config(method, {})
        assert gpu_packing.fits(config.group_size, method == "squat")
        assert gpu_packing.fits(config.value_group_size, False)
