"""Packed groups of a KV cache written: states are rounded, corrected for what rounding did, and packed, in one op.

The layout is that of `compress.kernels.affine_groups`, which reads it; the rounding that of `compress.kernels.rounding`. The
numbers that share a scale are the `tokens` of a row times the channels of a run: one channel of 64 tokens for keys, 32
channels of one token for values.

**Compensation** (SQuat, `compress.cache.compensation`): channels are visited in `order`, `block` at a time. What a block was
rounded by, e_t `[tokens, block]`, moves the channels f behind it, which are not rounded yet, before their scales are found:

    x_f += e_t G_t^T        G_t `[channels behind, block]`, of every block but the last, one after the other in `moves`

What is stored is in the model's order of channels again.

The plain-torch form is the op and runs everywhere; on a GPU the Triton kernel (`compress.kernels.gpu_packing`) takes a row
per program. Cost: the reference makes some forty passes over the states, five times that with a search, and compensation
makes as many launches for every block, which is all the time of a decode step that packs a group. The kernel is one launch.

Legend: B batch, H KV heads, N rows, T tokens of a row, R runs, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import gpu, gpu_packing
from compress.kernels.affine_groups import EIGHT_BITS
from compress.kernels.notice import reference_runs
from compress.kernels.pack import pack, packed_width
from compress.kernels.rounding import Grid, Rounded, quantize


def behind(width: int, block: int) -> range:
    """Channels behind each block but the last."""
    return range(width - block, 0, -block)


def pack_groups_reference(
    states: Tensor,
    bits: int,
    tokens: int,
    runs: int,
    dtype: torch.dtype,
    units: Tensor | None = None,
    centre: Tensor | None = None,
    order: Tensor | None = None,
    moves: Tensor | None = None,
    block: int = 0,
    fit: int = 0,
) -> tuple[Tensor, Tensor]:
    """Round and pack whole rows of states.

    Args:
        states: `[batch, heads, rows * tokens, channels]`.
        dtype: of scales and minima: fp16, bf16, or e4m3.
        units: fp32 `[batch, heads, 2]`, what 1.0 stands for in scales and minima of e4m3; None: 1.0.
        centre: fp32 `[batch, heads, channels]`, taken off every token.
        order: int64 `[batch or 1, heads, channels]`, which channel is visited when; None: all at once, no compensation.
            Runs must be single channels, and `block` divide them.
        moves: fp32 `[batch or 1, heads, sum of behind * block]`.
        fit: shrunken ranges tried for every scale.
    Returns:
        packed uint8 `[batch, heads, rows, bytes]` and affine `[batch, heads, rows, 2 runs]`, e4m3 as bytes.
    """
    x = states.float()
    if centre is not None:
        x = x - centre[:, :, None]
    x_BHNTC = x.unflatten(2, (-1, tokens))
    grid = Grid(dtype) if units is None else Grid(dtype, *units[..., None, None, None].unbind(2))
    if order is None:
        x = x_BHNTC.unflatten(-1, (runs, -1)).transpose(3, 4).flatten(-2)  # a row for every scale
        codes, scale, minimum, _ = quantize(x, bits, grid, fit)
    else:
        codes, scale, minimum = _compensated(x_BHNTC, bits, grid, order, moves, block, fit)
    codes = codes.unflatten(-1, (tokens, -1)).transpose(3, 4).flatten(3)
    return pack(codes, bits), torch.cat([scale, minimum], dim=-2).squeeze(-1)


def _compensated(
    x_BHNTC: Tensor, bits: int, grid: Grid, order_BHC: Tensor, moves: Tensor, block: int, fit: int
) -> tuple[Tensor, ...]:
    """Codes `[B, H, N, C, T]`, scales and minima `[B, H, N, C, 1]`."""
    batch, width = x_BHNTC.shape[0], x_BHNTC.shape[-1]
    order = order_BHC.expand(batch, -1, -1)
    x = x_BHNTC.gather(-1, order[:, :, None, None].expand_as(x_BHNTC))
    sizes = behind(width, block)
    parts = [part.unflatten(-1, (-1, block)) for part in moves.split([size * block for size in sizes], dim=-1)]
    blocks: list[Rounded] = []
    for start in range(0, width, block):
        part = x[..., start : start + block]
        blocks.append(quantize(part.mT, bits, grid, fit))
        if start + block < width:
            error = blocks[-1].values.mT - part
            x[..., start + block :] += error @ parts[len(blocks) - 1].mT[..., None, :, :]
    back = order.argsort(dim=-1)[:, :, None, :, None]
    visited = [torch.cat(tensors, dim=3) for tensors in list(zip(*blocks, strict=True))[:3]]
    return tuple(tensor.gather(3, back.expand_as(tensor)) for tensor in visited)


pack_groups = torch.library.custom_op("compress::pack_groups", pack_groups_reference, mutates_args=())


@pack_groups.register_kernel("cuda")
def pack_groups_cuda(
    states: Tensor, bits: int, tokens: int, runs: int, dtype: torch.dtype, units: Tensor | None = None,
    centre: Tensor | None = None, order: Tensor | None = None, moves: Tensor | None = None, block: int = 0, fit: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One launch: a program rounds, compensates and packs a row."""
    given = (states, bits, tokens, runs, dtype, units, centre, order, moves, block, fit)
    numbers = tokens * states.shape[3] // runs
    if not gpu_packing.fits(numbers, order is not None):
        reference_runs(f"no GPU kernel packs groups of {numbers} numbers" + (", compensated" if block else ""))
    elif gpu.usable(states):
        return gpu_packing.packed(*given)
    return pack_groups_reference(*given)


@pack_groups.register_fake
def _(states: Tensor, bits: int, tokens: int, runs: int, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, count, width = states.shape
    stored = torch.uint8 if dtype == EIGHT_BITS else dtype
    packed = states.new_empty(batch, heads, count // tokens, packed_width(tokens * width, bits), dtype=torch.uint8)
    return packed, states.new_empty(batch, heads, count // tokens, 2 * runs, dtype=stored)
