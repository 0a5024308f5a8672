"""Columns of a weight rounded one after the other, each by what those before it have left: the inner loop of
`compress.solvers.gptq`, for a block of B columns (stored as rows) of N output neurons.

For i = 0 .. B - 1, with m the block of a triangular or symmetric matrix:

    error feedback   code_i = round(state_i inverse_i)                        step_i = (state_i - code_i scale_i) / m_ii
    descent          code_i = round(old_i + state_i inverse_i / m_ii)         step_i = (code_i - old_i) scale_i
    both             codes within -half_i .. half_i - 1, and state_j -= m_ij step_i for all j > i

Neurons know nothing of each other. In torch a column is ten small operations, which a GPU spends waiting to be asked; the
Triton kernel takes a few neurons through the whole block, their states in registers.
Cost: N B^2 / 2 multiply-adds; the kernel finds state i by a sum over the block, three times as many operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import gpu
from compress.kernels.gpu import triton

ROWS = 8  # neurons of a program, which is one warp

if triton:
    import triton.language as tl

    @triton.jit
    def settle_columns(
        state, matrix, scale, inverse, half, old, codes, steps, N, B, m_row, m_column,
        DESCENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The block of neurons n; sums and products are rounded as the reference rounds them."""
        n, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        here = n < N
        tile = tl.load(state + j[:, None] * N + n[None, :], mask=(j < B)[:, None] & here[None, :], other=0)
        for i in range(0, B):
            at, known = i * N + n, matrix + i * m_row
            diagonal = tl.load(known + i * m_column)
            behind = tl.load(known + j * m_column, mask=(j > i) & (j < B), other=0)
            unit, inverse_unit = tl.load(scale + at, mask=here, other=0), tl.load(inverse + at, mask=here, other=0)
            most = tl.load(half + i).to(tl.float32)
            left = tl.sum(tl.where((j == i)[:, None], tile, 0.0), 0)
            wanted = left * inverse_unit
            if DESCENT:
                before = tl.load(old + at, mask=here, other=0)
                wanted = before + tl.div_rn(wanted, diagonal + tl.zeros((ROWS,), tl.float32))
            code = tl.maximum(wanted, -most, propagate_nan=tl.PropagateNan.ALL)
            code = tl.minimum(code, most - 1, propagate_nan=tl.PropagateNan.ALL)
            code = (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest whole number, ties to even
            if DESCENT:
                step = (code - before) * unit
            else:
                step = tl.div_rn(left - code * unit, diagonal + tl.zeros((ROWS,), tl.float32))
            tile -= behind[:, None] * step[None, :]
            tl.store(codes + at, code, mask=here)
            tl.store(steps + at, step, mask=here)


def round_columns_reference(
    state_BN: Tensor,
    matrix_BB: Tensor,
    scale_BN: Tensor,
    inverse_BN: Tensor,
    half_B: Tensor,
    old_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and steps `[B, N]` fp32.

    Args:
        state_BN: fp32, what is left of every column; or half the negative gradient of the error.
        matrix_BB: row i says how a step of column i moves the columns behind it.
        scale_BN, inverse_BN: of every column and neuron; an inverse of zero keeps a code at `old`, or at zero.
        half_B: int32, 2^(bits - 1) of every column.
        old_BN: codes to improve; None: error feedback.
    """
    state, codes, steps = state_BN.clone(), torch.empty_like(state_BN), torch.empty_like(state_BN)
    for i, half in enumerate(half_B.tolist()):
        wanted = state[i] * inverse_BN[i]
        if old_BN is not None:
            wanted = old_BN[i] + wanted / matrix_BB[i, i]
        codes[i] = wanted.round_().clamp_(-half, half - 1)
        if old_BN is None:
            steps[i] = (state[i] - codes[i] * scale_BN[i]) / matrix_BB[i, i]
        else:
            steps[i] = (codes[i] - old_BN[i]) * scale_BN[i]
        state[i + 1 :].addr_(matrix_BB[i, i + 1 :], steps[i], alpha=-1)
    return codes, steps


round_columns = torch.library.custom_op("compress::round_columns", round_columns_reference, mutates_args=())


@round_columns.register_kernel("cuda")
def round_columns_cuda(state_BN: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """One launch."""
    if not gpu.usable(state_BN):
        return round_columns_reference(state_BN, *given)
    matrix_BB, scale_BN, inverse_BN, half_B, old_BN = given if len(given) == 5 else (*given, None)
    count, neurons = state_BN.shape
    codes, steps = (torch.empty(count, neurons, dtype=torch.float32, device=state_BN.device) for _ in range(2))
    state, scale, inverse, old = (
        tensor.contiguous() for tensor in (state_BN, scale_BN, inverse_BN, state_BN if old_BN is None else old_BN)
    )
    settle_columns[(triton.cdiv(neurons, ROWS),)](
        state, matrix_BB, scale, inverse, half_B, old, codes, steps, neurons, count, *matrix_BB.stride(),
        DESCENT=old_BN is not None, ROWS=ROWS, BLOCK=max(16, triton.next_power_of_2(count)), num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, steps


@round_columns.register_fake
def _(state_BN: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state_BN), torch.empty_like(state_BN)
