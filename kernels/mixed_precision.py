"""y = x W^T for a weight stored as packed integers in two parts: low bits for most input columns, high bits for the last.

Layout, for I = L + H inputs, N output neurons, groups of `group_size` columns (0: the whole part) in either part:

    low         [N, packed_width(L, bits)]        uint8, code + 2^(bits-1), layout of `compress.kernels.pack`
    low_scale   [N, groups of L]                  16-bit float, one per row and group; the last group may be shorter
    high        [N, packed_width(H, high_bits)]   the same for the last H columns; None when H = 0
    high_scale  [N, groups of H]

With `activation_bits` 16 the weight is multiplied out and used as it is. With 4 or 8 the inputs are rounded on the fly:
per token, per part and per one of `activation_groups` equal slices of the part, asymmetric, the range forced to hold 0 and,
in parts of fewer than 8 bits, cut at `clip` times the root mean square of the slice (0: never); the high part gets
`high_bits`, but never fewer than the low one, and is not cut. With `rotate` the low part of the inputs goes through the
Hadamard transform first (`compress.kernels.hadamard`). Then codes meet codes:

    y[t, n] = sum over segments g of s_x[t,g] s_w[n,g] ( sum_k q_x[t,k] q_w[n,k] - z[t,g] rho[n,g] )

with rho = sum_k q_w. A segment is a run of columns that share both scales. The integer sums
are exact: products of 8-bit codes are added in fp32 in runs short enough for its 24 bits, then in int32.
Cost of the reference: 2 T N I flops, plus unpacking the weight at every call; it is no faster than the dense layer.

Legend: T tokens, K columns of a part, N output neurons, G segments.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compress.kernels import cpu, gpu, gpu_hadamard, gpu_products, gpu_rounded, gpu_rounding
from compress.kernels.hadamard import gpu_base, hadamard, hadamard_cpu
from compress.kernels.notice import reference_runs
from compress.kernels.outputs import shaped_like
from compress.kernels.pack import unpack_signed
from compress.kernels.part import Part

_EXACT = 1 << 24  # integers up to here are exact in fp32


def rounded_activation(x: Tensor, bits: int, groups: int, clip: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize `[..., K]` per token and slice: codes `[..., K]` from 0 to 2^bits - 1, scale and zero `[..., groups]`.

    All three are fp32; x ~= (code - zero) scale. The range always holds 0, so 0 is represented exactly.
    """
    slices = x.float().unflatten(-1, (groups, -1))
    low = slices.amin(dim=-1, keepdim=True).clamp_max(0)
    high = slices.amax(dim=-1, keepdim=True).clamp_min(0)
    if clip:
        bound = clip * slices.square().mean(dim=-1, keepdim=True).sqrt()
        low, high = low.maximum(-bound), high.minimum(bound)
    top = (1 << bits) - 1
    scale = (high - low) / top
    scale = torch.where(scale == 0, 1, scale)  # what is not finite makes its slice so
    zero = (-low / scale).round_()
    if clip:  # cut on both sides the zero is a tie, and would hang on the last bit of the bound
        zero = torch.where((low == -bound) & (high == bound) & (bound > 0), 1 << (bits - 1), zero)
    codes = (slices / scale).round_().add_(zero).clamp_(0, top)
    return codes.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)


def round_activation(x: Tensor, bits: int, groups: int, clip: float = 0.0) -> Tensor:
    """What the arithmetic sees of `x`: codes turned back into fp32 numbers."""
    codes, scale, zero = rounded_activation(x, bits, groups, clip)
    return ((codes.unflatten(-1, (groups, -1)) - zero[..., None]) * scale[..., None]).flatten(-2)


def dequantize_part(packed: Tensor, scale: Tensor, bits: int, width: int, group_size: int) -> Tensor:
    """The fp32 weight `[N, width]` of one part."""
    codes = unpack_signed(packed, bits, width).float()
    step = group_size or width
    return codes * scale.float().repeat_interleave(step, dim=1)[:, :width]


def segments(width: int, group_size: int, activation_groups: int) -> list[tuple[int, int, int, int]]:
    """`(start, stop, weight group, activation group)` of every run of columns that share both scales."""
    step, slice_width = group_size or width, width // activation_groups
    cuts = sorted({*range(0, width, step), *range(0, width, slice_width), width})
    return [(a, b, a // step, a // slice_width) for a, b in pairwise(cuts)]


def rotated(x: Tensor, high_features: int) -> Tensor:
    """`[..., I]` with the low part transformed; its own inverse."""
    transform = hadamard_cpu if cpu.direct(x) else hadamard
    low, high = x.split([x.shape[-1] - high_features, high_features], dim=-1)
    return torch.cat([transform(low), high], dim=-1) if high_features else transform(low)


def _parts(
    width: int, low: Tensor, low_scale: Tensor, high: Tensor | None, high_scale: Tensor | None, *sizes: Any
) -> list[Part]:
    stored = ((low, low_scale), (high, high_scale))
    return [Part(*tensors, *numbers) for tensors, numbers in zip(stored, _part_sizes(width, *sizes), strict=False)]


@lru_cache(maxsize=1024)  # a model has a few; a decode step asks for hundreds
def _part_sizes(
    width: int, bits: int, high_bits: int, high_features: int, group_size: int, activation_bits: int,
    activation_groups: int, clip: float, rotate: bool,
) -> list[tuple]:  # fmt: skip
    """What a `Part` holds besides its tensors, of the low part and of the high one if there is any."""
    slices = activation_groups if activation_bits < 16 else 1

    def sizes(bits: int, start: int, stop: int, seen_bits: int, clip: float) -> tuple:
        return bits, start, stop, group_size, seen_bits, slices, clip

    low_width = width - high_features
    parts = [sizes(bits, 0, low_width, activation_bits, clip if activation_bits < 8 else 0.0)]
    if high_features:
        parts.append(sizes(high_bits, low_width, width, max(high_bits, activation_bits), 0.0))
    return parts


def _weight(parts: list[Part]) -> Tensor:
    """The fp32 weight `[N, I]` of all parts, in stored coordinates."""
    return torch.cat([dequantize_part(p.packed, p.scale, p.bits, p.width, p.group_size) for p in parts], dim=1)


def _exact_product(x_TK: Tensor, w_NK: Tensor, largest: int) -> Tensor:
    """x w^T of integers held in fp32, `largest` bounding each product; exact, int32."""
    run = max(1, _EXACT // largest)
    total = torch.zeros(len(x_TK), len(w_NK), dtype=torch.int32, device=x_TK.device)
    for start in range(0, x_TK.shape[1], run):
        total += (x_TK[:, start : start + run] @ w_NK[:, start : start + run].T).to(torch.int32)
    return total


def _integer_part(x_TK: Tensor, part: Part) -> Tensor:
    codes, scale, zero = rounded_activation(x_TK, part.seen_bits, part.slices, part.clip)
    middle = 1 << (part.seen_bits - 1)  # centred, both factors are small and their products exact for longer
    codes, zero = codes - middle, zero - middle
    weight = unpack_signed(part.packed, part.bits, part.width).float()
    y = torch.zeros(len(x_TK), len(weight), dtype=torch.float32, device=x_TK.device)
    for a, b, g, h in segments(part.width, part.group_size, part.slices):
        product = _exact_product(codes[:, a:b], weight[:, a:b], middle << (part.bits - 1))
        product -= zero[:, h : h + 1].to(torch.int32) * weight[:, a:b].int().sum(dim=1).int()
        y += scale[:, h : h + 1] * part.scale[:, g].float() * product
    return y


def mixed_precision_reference(
    x: Tensor,
    low: Tensor,
    low_scale: Tensor,
    high: Tensor | None,
    high_scale: Tensor | None,
    bits: int,
    high_bits: int,
    high_features: int,
    group_size: int,
    activation_bits: int,
    activation_groups: int,
    clip: float,
    rotate: bool,
) -> Tensor:
    """`[..., I]` to `[..., N]` in the dtype of x; arguments as in the layout above."""
    parts = _parts(
        x.shape[-1], low, low_scale, high, high_scale, bits, high_bits, high_features, group_size, activation_bits,
        activation_groups, clip, rotate,
    )  # fmt: skip
    if rotate:
        x = rotated(x, high_features)
    x_TI = x.reshape(-1, x.shape[-1])
    if activation_bits == 16:
        return shaped_like(x, x_TI @ _weight(parts).to(x.dtype).T)
    y = sum(_integer_part(x_TI[:, part.start : part.stop], part) for part in parts)
    return shaped_like(x, y.to(x.dtype))


mixed_precision = torch.library.custom_op("compress::mixed_precision", mixed_precision_reference, mutates_args=())


@mixed_precision.register_kernel("cpu")
def mixed_precision_cpu(x: Tensor, *stored: Any) -> Tensor:
    """Few tokens: codes against codes (or 15 bits of what slices narrower than a group hold), without a weight. Many: the
    weight multiplied out by blocks of rows, in fp32."""
    *_, high_features, group_size, activation_bits, _, _, rotate = stored
    rounds, parts = activation_bits < 16, _parts(x.shape[-1], *stored)
    whole = group_size % 8 == 0 or group_size >= x.shape[-1]
    if not whole:
        reference_runs(f"no CPU kernel walks groups of {group_size}; multiples of 8 have one")
    if not whole or not cpu.usable(x) or parts[0].scale.dtype != torch.bfloat16:
        return mixed_precision_reference(x, *stored)
    if rotate:
        x = rotated(x, high_features)
    x_TI = x.reshape(-1, x.shape[-1])
    if x_TI.shape[0] <= cpu.MOST_TOKENS:
        return shaped_like(x, cpu.integer_linear(x_TI, parts))
    x_TI = x_TI.float()
    if rounds:
        x_TI = torch.cat([round_activation(x_TI[:, p.start : p.stop], p.seen_bits, p.slices, p.clip) for p in parts], dim=1)

    def expand(rows: slice, out: Tensor) -> None:
        for p in parts:
            cpu.expanded(p.packed[rows], p.scale[rows], p.bits, group_size, out[:, p.start : p.stop])

    y = cpu.product_by_blocks(x_TI, len(parts[0].packed), expand)
    return shaped_like(x, y.to(x.dtype))


@mixed_precision.register_kernel("cuda")
def mixed_precision_cuda(x: Tensor, *stored: Any) -> Tensor:
    """Rounded inputs: int8 tensor cores. Others: the packed codes if there are few, the weight expanded once if many."""
    *_, high_features, group_size, activation_bits, groups, _, rotate = stored
    rounds, parts = activation_bits < 16, _parts(x.shape[-1], *stored)
    whole = all(part.segment for part in parts) if rounds else group_size % 8 == 0
    if not whole:
        reference_runs(f"no GPU kernel walks groups of {group_size} in {groups} slices; multiples of 8 have one")
    if not whole or not gpu.usable(x):
        return mixed_precision_reference(x, *stored)
    if rounds:
        y = gpu_rounded.product(_gpu_codes(x, parts, rotate), parts, x.dtype)
        return shaped_like(x, y)
    x_TI = (rotated(x, high_features) if rotate else x).reshape(-1, x.shape[-1]).contiguous()
    weights = [gpu_products.Weight(part.packed, part.scale, part.bits, part.width, group_size) for part in parts]
    return shaped_like(x, gpu_products.product(x_TI, *weights))


def _gpu_codes(x: Tensor, parts: list[Part], rotate: bool) -> list[gpu_rounding.Codes]:
    """The rounded inputs of every part; transformed in the same pass where a program can hold the low part of a token."""
    x_TI, width = x.reshape(-1, x.shape[-1]).contiguous(), parts[0].stop
    known = gpu_base(x, width) if rotate else None
    fused = known and known[1].shared(len(x_TI), x.device).whole and parts[0].slices == 1
    if rotate and not fused:
        x_TI = rotated(x_TI, x.shape[-1] - width)
    codes = []
    for part in parts:
        seen, how = x_TI[:, part.start : part.stop], (part.bits, part.seen_bits, part.clip)
        if fused and part.start == 0:
            codes.append(gpu_hadamard.rounded(seen, *known, *how))
        else:
            codes.append(gpu_rounding.rounded(seen, part.slices, *how))
    return codes


@mixed_precision.register_fake
def _(x: Tensor, low: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], low.shape[0])


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *stored = inputs
    ctx.save_for_backward(*stored[:4])
    ctx.width, ctx.sizes = x.shape[-1], stored[4:]


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    """Of the inputs: what is packed is not trained. The rounding of inputs lets it through as it comes."""
    *_, high_features, _, _, _, _, rotate = ctx.sizes
    weight = _weight(_parts(ctx.width, *ctx.saved_tensors, *ctx.sizes))
    grad_x = grad @ weight.to(grad.dtype)
    return rotated(grad_x, high_features) if rotate else grad_x, *(None,) * (4 + len(ctx.sizes))


mixed_precision.register_autograd(_gradient, setup_context=_remember)
