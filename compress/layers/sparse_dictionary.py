"""Column-sparse codes over unit vectors, learned atoms or both: the storage of CoSpaDi and of pruned weights.

Layout: `compress.kernels.sparse_dictionary`. With unit vectors and no learned atom a code is a weight: a pruned matrix
behind a bitmask, or, when every atom is used, a plain matrix of integers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from compress.kernels.cpu import direct
from compress.kernels.pack import holds_more, pack_signed, packed_width
from compress.kernels.sparse_dictionary import (
    pack_mask,
    sparse_dictionary,
    sparse_dictionary_cpu,
    stored_codes,
    stored_dictionary,
    unpack_mask,
)
from compress.layers import CompressedLinear, Spec, TensorSpec
from compress.quantizer import SCALE_DTYPE, Group, groups_of

_PACKED = ("values", "mask", "scale", "dictionary", "dictionary_scale")
VALUE_BITS = (*range(2, 9), 16)


class Layer(CompressedLinear):
    """y = x A S + b. Spec: `unit_atoms` (whether the unit vectors are atoms), `num_atoms` (K, the learned ones),
    `num_nonzeros` (s per output neuron), `value_bits` and `dictionary_bits` (16: bf16, else integers), `group_size`
    (atoms that share the scale of their codes; 0: all unit ones, all learned ones) and `balance` (M: every M atoms in a
    row hold the same number of nonzeros; 0: anywhere)."""

    format = "sparse_dictionary"
    sizes: ClassVar = {
        "unit_atoms": bool, "num_atoms": int, "num_nonzeros": int, "value_bits": int, "dictionary_bits": int,
        "group_size": int, "balance": int,
    }  # fmt: skip
    options = ("unit_atoms", "num_atoms", "num_nonzeros", "value_bits", "group_size", "dictionary_bits")

    @classmethod
    def tensors(cls, spec: Spec) -> dict[str, TensorSpec]:
        _require_sizes(spec)
        inputs, rows, learned = spec["in_features"], spec["out_features"], spec["num_atoms"]
        atoms, nonzeros, bits = all_atoms(spec), spec["num_nonzeros"], spec["value_bits"]
        tensors: dict[str, TensorSpec] = {"values": ((rows, nonzeros), torch.bfloat16)}
        if bits < 16:
            tensors["values"] = ((rows, packed_width(nonzeros, bits)), torch.uint8)
            tensors["scale"] = ((rows, len(atom_groups(spec))), SCALE_DTYPE)
        if nonzeros < atoms:
            tensors["mask"] = ((rows, (atoms + 7) // 8), torch.uint8)
        if learned:
            width = spec["dictionary_bits"]
            tensors["dictionary"] = ((inputs, learned), torch.bfloat16)
            if width < 16:
                tensors["dictionary"] = ((inputs, packed_width(learned, width)), torch.uint8)
                tensors["dictionary_scale"] = ((learned,), SCALE_DTYPE)
        return tensors

    @classmethod
    def check(cls, spec: Spec, tensors: dict[str, Tensor]) -> None:
        for name, count, bits in (
            ("values", spec["num_nonzeros"], spec["value_bits"]),
            ("dictionary", spec["num_atoms"], spec["dictionary_bits"]),
        ):
            if bits < 16 and name in tensors and holds_more(tensors[name], bits, count):
                raise ValueError(f"{name} has codes beyond the {count} of a row")
        if "mask" not in tensors:
            return
        mask = unpack_mask(tensors["mask"])
        if mask[:, all_atoms(spec) :].any():
            raise ValueError(f"mask has bits beyond the {all_atoms(spec)} atoms")
        counts = mask.sum(dim=1)
        wrong = counts.ne(spec["num_nonzeros"]).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"mask of output {row} has {int(counts[row])} bits set, but {spec['num_nonzeros']} values are stored"
            )
        if spec["balance"]:
            counts = mask[:, : all_atoms(spec)].unflatten(1, (-1, spec["balance"])).sum(dim=2)
            if counts.ne(counts[0, 0]).any():
                raise ValueError(f"mask is not balanced: groups of {spec['balance']} atoms hold different numbers of bits")

    def forward(self, x: Tensor) -> Tensor:
        self.require_width(x)
        run = sparse_dictionary_cpu if direct(x) else sparse_dictionary
        *packed, bias = self.stored(*_PACKED, "bias")
        y = run(x, *packed, *self.op_options)
        return y if bias is None else y + bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        spec = self.spec
        units = spec["in_features"] if spec["unit_atoms"] else 0
        values, mask, scale, dictionary, dictionary_scale = self.stored(*_PACKED)
        sizes = (units, spec["num_atoms"], spec["num_nonzeros"], spec["value_bits"], spec["group_size"])
        codes = stored_codes(values, mask, scale, *sizes).float()
        if dictionary is None:
            return codes
        atoms = stored_dictionary(dictionary, dictionary_scale, spec["num_atoms"], spec["dictionary_bits"])
        learned = codes[:, units:] @ atoms.float().T
        return learned + codes[:, :units] if units else learned


def all_atoms(spec: Spec) -> int:
    """Unit vectors and learned atoms together: the width of a row of codes."""
    return spec["num_atoms"] + (spec["in_features"] if spec["unit_atoms"] else 0)


def atom_groups(spec: Spec) -> list[Group]:
    """The groups of atoms whose codes share a scale, as `compress.quantizer` and the solvers take them."""
    units, bits, size = all_atoms(spec) - spec["num_atoms"], spec["value_bits"], spec["group_size"]
    return groups_of(units, bits, size) + groups_of(spec["num_atoms"], bits, size, start=units)


def packed_codes(spec: Spec, codes_NA: Tensor, mask_NA: Tensor, scale_NG: Tensor | None) -> dict[str, Tensor]:
    """`values`, `mask` and `scale`. Without scales `codes` are the nonzeros themselves, else integers."""
    nonzeros = codes_NA[mask_NA].view(len(codes_NA), spec["num_nonzeros"])  # row by row, ascending atoms
    tensors = {}
    if scale_NG is None:
        tensors["values"] = nonzeros.to(torch.bfloat16).contiguous()
    else:
        tensors["values"] = pack_signed(nonzeros, spec["value_bits"])
        tensors["scale"] = scale_NG.to(SCALE_DTYPE).contiguous()
    if spec["num_nonzeros"] < all_atoms(spec):
        tensors["mask"] = pack_mask(mask_NA)
    return tensors


def _require_sizes(spec: Spec) -> None:
    atoms, nonzeros, balance = all_atoms(spec), spec["num_nonzeros"], spec["balance"]
    if not 1 <= nonzeros <= atoms:
        raise ValueError(f"impossible sizes: {nonzeros} nonzeros of {atoms} atoms")
    for key in ("value_bits", "dictionary_bits"):
        if spec[key] not in VALUE_BITS:
            raise ValueError(f"{key} is {spec[key]}; expected 2 to 8, or 16 for bf16")
    if balance and (atoms % balance or nonzeros % (atoms // balance)):
        raise ValueError(f"{nonzeros} nonzeros of {atoms} atoms do not spread evenly over groups of {balance}")
