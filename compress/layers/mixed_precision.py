"""Packed integers in two precisions: the storage of RTN, GPTQ, QuaRot and ResQ; layout: `compress.kernels.mixed_precision`.

Before the integers meet the inputs, the inputs may change their coordinates; the weight is stored in the new ones:

    heads      x is `heads` heads side by side (the input of o_proj); the last `high_features / heads` coordinates of every
               head are gathered at the end, where the high part is
    hadamard   the low part is multiplied by an orthonormal Hadamard matrix, which spreads outliers over all its columns

Both are orthogonal, so in exact arithmetic they change nothing.
"""

from __future__ import annotations

from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from compress.kernels.cpu import direct
from compress.kernels.mixed_precision import (
    dequantize_part,
    mixed_precision,
    mixed_precision_cpu,
    rotated,
    round_activation,
)
from compress.kernels.pack import holds_more, pack_signed, packed_width
from compress.layers import CompressedLinear, Spec, TensorSpec
from compress.quantizer import SCALE_DTYPE, Group, groups_of

WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = (4, 8, 16)
_ACTIVATION_SCALE_BITS = 24  # a 16-bit scale and a zero of at most 8 bits, per token, part and slice


class Layer(CompressedLinear):
    """Spec: `bits`, `group_size` (0: one scale per row), `high_features`, `high_bits`, `heads`, `hadamard`,
    `activation_bits` (16: not rounded), `activation_groups` and `clip`; see the layout."""

    format = "mixed_precision"
    sizes: ClassVar = {
        "bits": int, "group_size": int, "high_features": int, "high_bits": int, "heads": int, "hadamard": bool,
        "activation_bits": int, "activation_groups": int, "clip": float,
    }  # fmt: skip
    options = (
        "bits", "high_bits", "high_features", "group_size", "activation_bits", "activation_groups", "clip", "hadamard",
    )  # fmt: skip

    @classmethod
    def tensors(cls, spec: Spec) -> dict[str, TensorSpec]:
        _require_sizes(spec)
        rows, high = spec["out_features"], spec["high_features"]
        low = spec["in_features"] - high
        tensors = {
            "low": ((rows, packed_width(low, spec["bits"])), torch.uint8),
            "low_scale": ((rows, len(groups_of(low, spec["bits"], spec["group_size"]))), SCALE_DTYPE),
        }
        if high:
            tensors["high"] = ((rows, packed_width(high, spec["high_bits"])), torch.uint8)
            tensors["high_scale"] = ((rows, len(groups_of(high, spec["high_bits"], spec["group_size"]))), SCALE_DTYPE)
        return tensors

    @classmethod
    def check(cls, spec: Spec, tensors: dict[str, Tensor]) -> None:
        widths = {"low": (spec["in_features"] - spec["high_features"], spec["bits"])}
        widths["high"] = (spec["high_features"], spec["high_bits"])
        for name, (width, bits) in widths.items():
            if name in tensors and holds_more(tensors[name], bits, width):
                raise ValueError(f"{name} has codes beyond its {width} columns")

    def forward(self, x: Tensor) -> Tensor:
        self.require_width(x)
        run = mixed_precision_cpu if direct(x) else mixed_precision
        *packed, bias = self.stored("low", "low_scale", "high", "high_scale", "bias")
        y = run(_gather(self.spec, x), *packed, *self.op_options)
        return y if bias is None else y + bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        return from_storage(self.spec, self.stored_weight())

    def stored_weight(self) -> Tensor:
        """The fp32 weight `[N, I]` in the coordinates it is stored in."""
        spec, high = self.spec, self.spec["high_features"]
        weight = dequantize_part(self.low, self.low_scale, spec["bits"], self.in_features - high, spec["group_size"])
        if not high:
            return weight
        rest = dequantize_part(self.high, self.high_scale, spec["high_bits"], high, spec["group_size"])
        return torch.cat([weight, rest], dim=1)

    @classmethod
    def rounding(cls, spec: Spec) -> tuple:
        keys = ("activation_bits", "activation_groups", "clip", "high_features", "high_bits", "heads", "hadamard")
        return tuple(spec[key] for key in keys) if spec["activation_bits"] < 16 else ()

    @classmethod
    def activation_bits(cls, spec: Spec) -> float:
        if spec["activation_bits"] == 16:
            return 16.0
        inputs, high = spec["in_features"], spec["high_features"]
        parts = 2 if high else 1
        scales = parts * spec["activation_groups"] * _ACTIVATION_SCALE_BITS
        low_bits, high_bits = spec["activation_bits"], max(spec["activation_bits"], spec["high_bits"])
        return ((inputs - high) * low_bits + high * high_bits + scales) / inputs

    @classmethod
    def seen_input(cls, spec: Spec, x: Tensor) -> Tensor:
        if spec["activation_bits"] == 16:
            return x
        low, high = to_storage(spec, x).split([x.shape[-1] - spec["high_features"], spec["high_features"]], dim=-1)
        bits, groups = spec["activation_bits"], spec["activation_groups"]
        parts = [round_activation(low, bits, groups, spec["clip"] if bits < 8 else 0.0)]
        if spec["high_features"]:
            parts.append(round_activation(high, max(bits, spec["high_bits"]), groups))
        return from_storage(spec, torch.cat(parts, dim=-1)).to(x.dtype)


def column_groups(spec: Spec) -> list[Group]:
    """The groups of all stored columns, low part first, as `compress.quantizer` and the solvers take them."""
    low = spec["in_features"] - spec["high_features"]
    return groups_of(low, spec["bits"], spec["group_size"]) + groups_of(
        spec["high_features"], spec["high_bits"], spec["group_size"], start=low
    )


def packed_tensors(spec: Spec, codes_NI: Tensor, scales_NG: Tensor) -> dict[str, Tensor]:
    """Codes int8 and scales of all columns, in stored coordinates, as the layer's tensors."""
    low = spec["in_features"] - spec["high_features"]
    count = len(groups_of(low, spec["bits"], spec["group_size"]))
    parts = {"low": (codes_NI[:, :low], scales_NG[:, :count], spec["bits"])}
    if spec["high_features"]:
        parts["high"] = (codes_NI[:, low:], scales_NG[:, count:], spec["high_bits"])
    tensors = {}
    for name, (codes, scales, bits) in parts.items():
        tensors[name] = pack_signed(codes, bits)
        tensors[f"{name}_scale"] = scales.to(SCALE_DTYPE).contiguous()
    return tensors


def to_storage(spec: Spec, x: Tensor) -> Tensor:
    """`[..., I]` from the model's input coordinates to those of the stored weight; weights transform as inputs do."""
    x = _gather(spec, x)
    return rotated(x, spec["high_features"]) if spec["hadamard"] else x


def from_storage(spec: Spec, x: Tensor) -> Tensor:
    """The inverse of `to_storage`."""
    if spec["hadamard"]:
        x = rotated(x, spec["high_features"])
    return _scatter(spec, x)


def stored_gram(spec: Spec, gram_II: Tensor) -> Tensor:
    """A Gram matrix of the inputs in the coordinates of the stored weight."""
    return to_storage(spec, to_storage(spec, gram_II).T).T


def _gather(spec: Spec, x: Tensor) -> Tensor:
    """Heads side by side -> the low coordinates of all heads, then the high ones."""
    heads, high = spec["heads"], spec["high_features"]
    if not heads:
        return x
    of_heads = x.unflatten(-1, (heads, -1))
    low = of_heads.shape[-1] - high // heads
    return torch.cat([of_heads[..., :low].flatten(-2), of_heads[..., low:].flatten(-2)], dim=-1)


def _scatter(spec: Spec, x: Tensor) -> Tensor:
    """The inverse of `_gather`."""
    heads, high = spec["heads"], spec["high_features"]
    if not heads:
        return x
    low, rest = x.split([x.shape[-1] - high, high], dim=-1)
    return torch.cat([low.unflatten(-1, (heads, -1)), rest.unflatten(-1, (heads, -1))], dim=-1).flatten(-2)


def _require_sizes(spec: Spec) -> None:
    inputs, high, heads = spec["in_features"], spec["high_features"], spec["heads"]
    if spec["bits"] not in WEIGHT_BITS or spec["high_bits"] not in WEIGHT_BITS:
        raise ValueError(f"weights of {spec['bits']} and {spec['high_bits']} bits; 2 to 8 are stored")
    if spec["activation_bits"] not in ACTIVATION_BITS:
        raise ValueError(f"activations of {spec['activation_bits']} bits; expected 4, 8 or 16")
    if not 0 <= high < inputs or spec["group_size"] < 0 or not 0 <= spec["clip"] < inf:
        raise ValueError(f"impossible sizes: {high} of {inputs} columns in the high part, groups of {spec['group_size']}")
    if heads and (heads < 0 or inputs % heads or high % heads):
        raise ValueError(f"{inputs} columns, {high} of them high, do not divide into {heads} heads")
    groups = spec["activation_groups"]
    if groups < 1 or (inputs - high) % groups or high % groups:
        raise ValueError(f"{inputs - high} low and {high} high columns do not divide into {groups} activation groups")
