"""y = x W^T for a weight stored as packed integers in two parts: low bits for most input columns, high bits for the last.

Layout, for I = L + H inputs, N output neurons, groups of `group_size` columns (0: the whole part) in either part:

    low         [N, packed_width(L, bits)]        uint8, code + 2^(bits-1), layout of `compress.kernels.pack`
    low_scale   [N, groups of L]                  16-bit float, one per row and group; the last group may be shorter
    high        [N, packed_width(H, high_bits)]   the same for the last H columns; None when H = 0
    high_scale  [N, groups of H]

With `activation_bits` 16 the weight is multiplied out and used as it is. With 4 or 8 the inputs are rounded on the fly:
per token, per part and per one of `activation_groups` equal slices of the part, asymmetric, the range forced to hold 0 and,
in parts of fewer than 8 bits, cut at `clip` times the root mean square of the slice (0: never); the high part gets
`high_bits`, but never fewer than the low one, and is not cut. Then codes meet codes:

    y[t, n] = sum over segments g of s_x[t,g] s_w[n,g] ( sum_k q_x[t,k] q_w[n,k] - z[t,g] rho[n,g] )

with rho = sum_k q_w, known before any token is. A segment is a run of columns that share both scales. The integer sums
are exact: products of 8-bit codes are added in fp32 in runs short enough for its 24 bits, then in int32.
Cost of the reference: 2 T N I flops, plus unpacking the weight at every call; it is no faster than the dense layer.

Legend: T tokens, K columns of a part, N output neurons, G segments.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from compress.kernels import cpu, gpu
from compress.kernels.notice import reference_runs
from compress.kernels.pack import unpack

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
    scale = (high - low) / ((1 << bits) - 1)
    scale = torch.where(scale > 0, scale, 1)
    zero = (-low / scale).round_()
    codes = (slices / scale).round_().add_(zero).clamp_(0, (1 << bits) - 1)
    return codes.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)


def round_activation(x: Tensor, bits: int, groups: int, clip: float = 0.0) -> Tensor:
    """What the arithmetic sees of `x`: codes turned back into fp32 numbers."""
    codes, scale, zero = rounded_activation(x, bits, groups, clip)
    return ((codes.unflatten(-1, (groups, -1)) - zero[..., None]) * scale[..., None]).flatten(-2)


def weight_codes(packed: Tensor, bits: int, width: int) -> Tensor:
    """Signed codes `[N, width]` int8."""
    return (unpack(packed, bits, width).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def dequantize_part(packed: Tensor, scale: Tensor, bits: int, width: int, group_size: int) -> Tensor:
    """The fp32 weight `[N, width]` of one part."""
    codes = weight_codes(packed, bits, width).float()
    step = group_size or width
    return codes * scale.float().repeat_interleave(step, dim=1)[:, :width]


def segments(width: int, group_size: int, activation_groups: int) -> list[tuple[int, int, int, int]]:
    """`(start, stop, weight group, activation group)` of every run of columns that share both scales."""
    step, slice_width = group_size or width, width // activation_groups
    cuts = sorted({*range(0, width, step), *range(0, width, slice_width), width})
    return [(a, b, a // step, a // slice_width) for a, b in pairwise(cuts)]


def row_sums(packed: Tensor, bits: int, width: int, group_size: int, activation_groups: int) -> Tensor:
    """rho: the sum of the codes of each row and segment, `[N, segments]` int32."""
    codes = weight_codes(packed, bits, width).int()
    return torch.stack(
        [codes[:, a:b].sum(dim=1) for a, b, *_ in segments(width, group_size, activation_groups)], dim=1
    ).int()


def _exact_product(x_TK: Tensor, w_NK: Tensor, largest: int) -> Tensor:
    """x w^T of integers held in fp32, `largest` bounding each product; exact, int32."""
    run = max(1, _EXACT // largest)
    total = torch.zeros(len(x_TK), len(w_NK), dtype=torch.int32, device=x_TK.device)
    for start in range(0, x_TK.shape[1], run):
        total += (x_TK[:, start : start + run] @ w_NK[:, start : start + run].T).to(torch.int32)
    return total


def _integer_part(
    x_TK: Tensor,
    packed: Tensor,
    scale_NG: Tensor,
    sums_NG: Tensor,
    bits: int,
    activation_bits: int,
    group_size: int,
    activation_groups: int,
    clip: float,
) -> Tensor:
    width = x_TK.shape[1]
    codes, scale, zero = rounded_activation(x_TK, activation_bits, activation_groups, clip)
    middle = 1 << (activation_bits - 1)  # centred, both factors are small and their products exact for longer
    codes, zero = codes - middle, zero - middle
    weight = weight_codes(packed, bits, width).float()
    y = torch.zeros(len(x_TK), len(weight), dtype=torch.float32, device=x_TK.device)
    for index, (a, b, g, h) in enumerate(segments(width, group_size, activation_groups)):
        product = _exact_product(codes[:, a:b], weight[:, a:b], middle << (bits - 1))
        product -= zero[:, h : h + 1].to(torch.int32) * sums_NG[:, index]
        y += scale[:, h : h + 1] * scale_NG[:, g].float() * product
    return y


def mixed_precision_reference(
    x: Tensor,
    low: Tensor,
    low_scale: Tensor,
    low_sums: Tensor | None,
    high: Tensor | None,
    high_scale: Tensor | None,
    high_sums: Tensor | None,
    bits: int,
    high_bits: int,
    high_features: int,
    group_size: int,
    activation_bits: int,
    activation_groups: int,
    clip: float,
) -> Tensor:
    """`[..., I]` to `[..., N]` in the dtype of x; arguments as in the layout above, `*_sums` from `row_sums`."""
    low_width = x.shape[-1] - high_features
    x_TI = x.reshape(-1, x.shape[-1])
    if activation_bits == 16:
        weight = dequantize_part(low, low_scale, bits, low_width, group_size)
        if high is not None:
            weight = torch.cat([weight, dequantize_part(high, high_scale, high_bits, high_features, group_size)], dim=1)
        return (x_TI @ weight.to(x.dtype).T).view(*x.shape[:-1], -1)
    y = _integer_part(
        x_TI[:, :low_width], low, low_scale, low_sums, bits, activation_bits, group_size, activation_groups,
        clip if activation_bits < 8 else 0.0,
    )  # fmt: skip
    if high is not None:
        y += _integer_part(
            x_TI[:, low_width:], high, high_scale, high_sums, high_bits, max(high_bits, activation_bits), group_size,
            activation_groups, 0.0,
        )  # fmt: skip
    return y.to(x.dtype).view(*x.shape[:-1], -1)


mixed_precision = torch.library.custom_op("compress::mixed_precision", mixed_precision_reference, mutates_args=())


@mixed_precision.register_kernel("cpu")
def mixed_precision_cpu(
    x: Tensor, low: Tensor, low_scale: Tensor, low_sums: Tensor | None, high: Tensor | None, high_scale: Tensor | None,
    high_sums: Tensor | None, bits: int, high_bits: int, high_features: int, group_size: int, activation_bits: int,
    activation_groups: int, clip: float,
) -> Tensor:  # fmt: skip
    """Few tokens: codes against codes, without a weight. Many: the weight multiplied out once, in fp32."""
    low_width = x.shape[-1] - high_features
    parts = [(low, low_scale, bits, activation_bits, 0, low_width, clip if activation_bits < 8 else 0.0)]
    if high is not None:
        parts.append((high, high_scale, high_bits, max(high_bits, activation_bits), low_width, high_features, 0.0))
    rounds = activation_bits < 16
    ways = [_segment(width, group_size, activation_groups if rounds else 1) for *_, width, _ in parts]
    if not all(ways):
        reference_runs(f"no CPU kernel walks groups of {group_size} in {activation_groups} slices")
    if not all(ways) or not cpu.usable(x) or low_scale.dtype != torch.bfloat16:
        return mixed_precision_reference(
            x, low, low_scale, low_sums, high, high_scale, high_sums, bits, high_bits, high_features, group_size,
            activation_bits, activation_groups, clip,
        )  # fmt: skip
    x_TI, y = x.reshape(-1, x.shape[-1]).float(), None
    if len(x_TI) > cpu.MOST_TOKENS:
        weight = torch.empty(len(low), x.shape[-1])
        for packed, scale, width_bits, _, start, width, _ in parts:
            cpu.expanded(packed, scale, width_bits, group_size, weight[:, start : start + width])
        if rounds:
            seen = [
                round_activation(x_TI[:, start : start + width], seen_bits, activation_groups, cut)
                for _, _, _, seen_bits, start, width, cut in parts
            ]
            x_TI = torch.cat(seen, dim=1)
        return (x_TI @ weight.T).to(x.dtype).view(*x.shape[:-1], -1)
    for (packed, scale, width_bits, seen_bits, start, width, cut), segment in zip(parts, ways, strict=True):
        part, input_scale = x_TI[:, start : start + width], None
        if rounds:
            codes, input_scale, zero = rounded_activation(part, seen_bits, activation_groups, cut)
            part = (codes.unflatten(-1, (activation_groups, -1)) - zero[..., None]).flatten(-2)
            input_scale = (
                input_scale.repeat_interleave(width // activation_groups // segment, dim=1)
                if (activation_groups > 1)
                else input_scale.expand(-1, -(-width // segment))
            )
        inputs = cpu.arranged(part, segment, width_bits, input_scale)
        y = cpu.integer_product(inputs, segment, packed, scale, width_bits, group_size, add_to=y)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


@mixed_precision.register_kernel("cuda")
def mixed_precision_cuda(
    x: Tensor, low: Tensor, low_scale: Tensor, low_sums: Tensor | None, high: Tensor | None, high_scale: Tensor | None,
    high_sums: Tensor | None, bits: int, high_bits: int, high_features: int, group_size: int, activation_bits: int,
    activation_groups: int, clip: float,
) -> Tensor:  # fmt: skip
    """Few tokens: the Triton kernel on packed codes. Many: the weight expanded once, cuBLAS; inputs that are rounded take
    the exact reference then."""
    low_width, rounds = x.shape[-1] - high_features, activation_bits < 16
    x_TI = x.reshape(-1, x.shape[-1])
    few = len(x_TI) <= gpu.MOST_TOKENS
    whole = group_size % 8 == 0
    if not whole:
        reference_runs(f"no GPU kernel walks groups of {group_size}; multiples of 8 have one")
    if not whole or not gpu.usable(x) or (rounds and not few):
        return mixed_precision_reference(
            x, low, low_scale, low_sums, high, high_scale, high_sums, bits, high_bits, high_features, group_size,
            activation_bits, activation_groups, clip,
        )  # fmt: skip
    parts = [(low, low_scale, bits, activation_bits, x_TI[:, :low_width], clip if activation_bits < 8 else 0.0)]
    if high is not None:
        parts.append((high, high_scale, high_bits, max(high_bits, activation_bits), x_TI[:, low_width:], 0.0))
    if not few:
        weight = torch.empty(len(low), x.shape[-1], dtype=x.dtype, device=x.device)
        sides = (weight[:, :low_width], weight[:, low_width:])
        for (packed, scale, width, *_), side in zip(parts, sides, strict=False):
            gpu.expanded(packed, scale, width, group_size, side)
        return (x_TI @ weight.T).view(*x.shape[:-1], -1)
    y = None
    for packed, scale, width, seen_bits, part, cut in parts:
        seen = round_activation(part, seen_bits, activation_groups, cut) if rounds else part
        y = gpu.integer_product(seen, packed, scale, width, group_size, y)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def _segment(width: int, group_size: int, slices: int) -> int:
    """Columns that share all scales, as the CPU kernel walks them; 0 where it cannot."""
    step, of_slice = group_size or width, width // slices
    segment = step if slices == 1 else of_slice
    fits = slices == 1 or step % of_slice == 0
    return segment if fits and (segment == width or segment % 8 == 0) else 0


@mixed_precision.register_fake
def _(
    x, low, low_scale, low_sums, high, high_scale, high_sums, bits, high_bits, high_features, group_size,
    activation_bits, activation_groups, clip,
):  # fmt: skip
    return x.new_empty(*x.shape[:-1], low.shape[0])
