"""The reference of the inner loop of GPTQ; the Triton kernel is compared with it in test_gpu_rounded.py."""

from __future__ import annotations

import pytest
import torch

from compress.kernels.column_rounding import round_columns


def block(columns: int = 12, neurons: int = 7) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    scale = torch.rand(columns, neurons) + 0.5
    half = torch.tensor([8, 2, 128], dtype=torch.int32).repeat(columns)[:columns]
    return 6 * torch.randn(columns, neurons), torch.eye(columns), scale, 1 / scale, half


@pytest.mark.parametrize("descent", [False, True])
def test_is_a_torch_operator(descent: bool) -> None:
    state, *others = block()
    torch.library.opcheck(round_columns, (state, *others, torch.zeros_like(state) if descent else None))


def test_columns_that_know_nothing_of_each_other_are_rounded_to_the_nearest() -> None:
    state, eye, scale, inverse, half = block()
    codes, steps = round_columns(state, eye, scale, inverse, half)
    want = (state / scale).round().clamp(-half[:, None], half[:, None] - 1)
    assert codes.equal(want)
    torch.testing.assert_close(steps, state - want * scale)


def test_descent_lowers_the_error_and_ends_where_no_code_can() -> None:
    target, _, scale, inverse, half = block()
    mixed = torch.randn(12, 40)
    gram = mixed @ mixed.T

    def error(codes: torch.Tensor) -> torch.Tensor:
        off = target - codes * scale
        return (off * (gram @ off)).sum(dim=0)

    codes, errors = torch.zeros_like(target), [error(torch.zeros_like(target))]
    for _ in range(20):
        codes, _ = round_columns(gram @ (target - codes * scale), gram, scale, inverse, half, codes)
        errors.append(error(codes))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()
    assert (errors[1] < 0.5 * errors[0]).all()
    for i in range(len(codes)):
        for move in (-1, 1):
            other = codes.clone()
            other[i] = (other[i] + move).clamp(-half[i], half[i] - 1)
            assert (error(other) >= errors[-1] * (1 - 1e-5)).all()
