"""Packed groups of a KV cache multiplied out: x = code * scale + minimum (+ centre), the read of every decode step.

One layout serves keys and values. A packed row holds `tokens` tokens of `runs` runs of channels, codes one token after the
other (`compress.kernels.pack`); its affine row holds the scale of every run and then the minimum of every run. Keys rounded
per channel in groups of 32 tokens: tokens 32, runs head_dim. Values per token in groups of 32 channels: tokens 1, runs
head_dim / 32.

The plain-torch form is the reference and runs everywhere. On a CPU the C++ kernel gives the same numbers in one pass over
the bytes, on a GPU the Triton kernel does. Cost: reading b / 8 bytes and writing 2 or 4 per element; the reference makes
about ten passes, in slices that bound its transients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels import cpu, gpu, gpu_groups
from compress.kernels.layout import one_outer
from compress.kernels.pack import unpack

EIGHT_BITS = torch.float8_e4m3fn
_SLICE = 1024  # tokens of one pass of the reference


def expand_groups(
    packed: Tensor,
    affine: Tensor,
    bits: int,
    runs: int,
    out: Tensor,
    units: Tensor | None = None,
    centre: Tensor | None = None,
) -> None:
    """Write the values of packed rows into `out`.

    Args:
        packed: uint8 `[batch, heads, rows, bytes]`.
        affine: `[batch, heads, rows, 2 runs]`, fp16 or bf16, or the bytes of e4m3.
        out: `[batch, heads, rows * tokens, channels]` fp32, fp16 or bf16; a view is written in place.
        units: fp32 `[batch, heads, 2]`, what 1.0 stands for in scales and minima of eight bits.
        centre: fp32 `[batch, heads, channels]`, added to every token.
    """
    if not packed.shape[2]:
        return
    if out.is_cuda and gpu.usable(out) and all(map(one_outer, (packed, affine, out))):
        gpu_groups.expand_groups(packed, affine, bits, runs, out, units, centre)
    elif fits_cpu(packed, affine, out, runs) and one_outer(out):
        cpu.expand_groups(packed, affine, bits, runs, out, units, centre)
    else:
        expand_groups_reference(packed, affine, bits, runs, out, units, centre)


def expand_groups_reference(
    packed: Tensor,
    affine: Tensor,
    bits: int,
    runs: int,
    out: Tensor,
    units: Tensor | None = None,
    centre: Tensor | None = None,
) -> None:
    """The same in torch."""
    rows, channels = packed.shape[2], out.shape[3]
    tokens = out.shape[2] // rows
    step = max(1, _SLICE // tokens)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        scale, minimum = affine_values(affine[:, :, part], units)
        codes = unpack(packed[:, :, part], bits, tokens * channels).unflatten(-1, (tokens, runs, -1))
        x = codes.float() * scale[..., None, :, None] + minimum[..., None, :, None]
        x = x.flatten(-2).flatten(2, 3)
        out[:, :, first * tokens : (first + step) * tokens] = x if centre is None else x + centre[:, :, None]


def affine_values(affine: Tensor, units: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and minima `[batch, heads, rows, runs]` in fp32."""
    if affine.dtype == torch.uint8:
        affine = affine.view(EIGHT_BITS)
    scale, minimum = affine.float().chunk(2, dim=-1)
    if units is None:
        return scale, minimum
    return scale * units[:, :, None, :1], minimum * units[:, :, None, 1:]


def fits_cpu(packed: Tensor, affine: Tensor, dense: Tensor, runs: int) -> bool:
    """Whether the C++ kernels read these beside states like `dense`; scales of fp16 are left to the reference."""
    known = packed.device.type == "cpu" and affine.dtype in (torch.uint8, torch.bfloat16)
    known &= dense.dtype in (torch.float32, torch.bfloat16)
    whole = one_outer(packed) and one_outer(affine)
    return known and whole and runs <= 512 and type(dense) is Tensor and cpu.usable(dense)
