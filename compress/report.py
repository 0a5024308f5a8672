"""What a run did, in numbers: one entry per matrix, totals, and the table that ends a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.table import Table

from compress.layers import Spec, dense_bytes, layer_class, packed_bytes


@dataclass(frozen=True)
class ModuleReport:
    """One compressed matrix. Bytes are those on disk; `error` is ||X(W - What)|| / ||XW|| on the calibration inputs, tokens
    counted as the recipe says, or None when only the checkpoint is left to tell."""

    name: str
    method: str
    spec: dict[str, Any]
    dense_bytes: int
    packed_bytes: int
    error: float | None
    seconds: float

    @classmethod
    def of(cls, name: str, method: str, spec: Spec, error: float | None, seconds: float) -> ModuleReport:
        return cls(name, method, spec, dense_bytes(spec), packed_bytes(spec), error, round(seconds, 3))

    @property
    def bits_per_weight(self) -> float:
        return 16 * self.packed_bytes / self.dense_bytes

    @property
    def activation_bits(self) -> float:
        """Bits per input value, scales counted; in averages weighted by the weights that each input meets."""
        return layer_class(self.spec["format"]).activation_bits(self.spec)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """Everything recorded with a compressed checkpoint, as `report.json`."""

    modules: list[ModuleReport]
    model: str
    calibration: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    peak_memory_bytes: int | None
    recipe: dict[str, Any]
    identity: dict[str, str]
    made_from: str = ""  # hash of the blocks of the original (`compress.lineage`)
    trials_from: str = ""  # the name of the checkpoint whose trials were used again
    checkpoint_bytes: int = 0
    dense_checkpoint_bytes: int = 0
    totals: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        return cls(**{**data, "modules": [ModuleReport(**entry) for entry in data["modules"]]})

    def to_dict(self) -> dict[str, Any]:
        return asdict(replace(self, totals=self.summary()))

    @classmethod
    def of_specs(cls, specs: Mapping[str, Spec], checkpoint_bytes: int, dense_checkpoint_bytes: int) -> Report:
        """What config.json alone tells about a checkpoint that lost its report; the format stands for the method."""
        in_order = sorted(specs, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(6), name))
        modules = [ModuleReport.of(name, specs[name]["format"], specs[name], None, 0.0) for name in in_order]
        sizes = {"checkpoint_bytes": checkpoint_bytes, "dense_checkpoint_bytes": dense_checkpoint_bytes}
        return cls(modules, "", {}, {}, 0.0, 0, {}, {}, **sizes)

    @property
    def worst(self) -> ModuleReport | None:
        """The matrix with the largest error; None when the errors are not known."""
        known = [module for module in self.modules if module.error is not None]
        return max(known, key=lambda module: module.error, default=None)

    def bits(self) -> dict[str, float]:
        """Average bits of a weight and of an activation of the compressed matrices, scales counted."""
        dense = sum(module.dense_bytes for module in self.modules)
        return {
            "bits_per_weight": 16 * sum(module.packed_bytes for module in self.modules) / dense,
            "bits_per_activation": sum(module.dense_bytes * module.activation_bits for module in self.modules) / dense,
        }

    def summary(self) -> dict[str, Any]:
        dense = sum(module.dense_bytes for module in self.modules)
        packed = sum(module.packed_bytes for module in self.modules)
        errors = [module.error for module in self.modules if module.error is not None]
        return {
            "dense_bytes": dense,
            "packed_bytes": packed,
            "measured_ratio": 1 - packed / dense,
            **self.bits(),
            "mean_error": sum(errors) / len(errors) if errors else None,
            "worst_error": self.worst and self.worst.error,
            "worst_module": self.worst and self.worst.name,
        }

    def table(self) -> Table:
        totals = self.summary()
        table = Table("", "before", "after", "change", title=f"{len(self.modules)} matrices compressed")
        for column in table.columns[1:]:
            column.justify = "right"

        def size(label: str, before: int, after: int) -> None:
            table.add_row(label, megabytes(before), megabytes(after), f"{100 * (after / before - 1):+.1f} %")

        size("compressed matrices (before: bf16)", totals["dense_bytes"], totals["packed_bytes"])
        size("whole checkpoint", self.dense_checkpoint_bytes, self.checkpoint_bytes)
        bits = f"{totals['bits_per_weight']:.2f} weights, {totals['bits_per_activation']:.2f} activations"
        table.add_row("bits, scales counted", "16", bits, "")
        if self.worst is None:
            return table  # only sizes are known
        table.add_row("mean output error", "", shown_error(totals["mean_error"]), "")
        table.add_row("worst output error", "", shown_error(self.worst.error), self.worst.name)
        table.add_row("calibration tokens", "", f"{self.calibration['tokens']}", "")
        table.add_row("time", "", duration(self.seconds), "")
        peak = "unknown" if self.peak_memory_bytes is None else megabytes(self.peak_memory_bytes)
        table.add_row("peak memory", "", peak, "")
        return table


def shown_error(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.4f}"


def megabytes(count: float) -> str:
    """Decimal megabytes, as disks and hubs count them."""
    return f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (f"{minutes} min {rest} s" if rest else f"{minutes} min") if minutes else f"{seconds:.1f} s"


_SHOWN = {"format", "in_features", "out_features", "bias"}  # elsewhere in every table
_NEUTRAL = {"activation_bits": 16, "activation_groups": 1}  # of a layer that rounds no inputs


def balance(spec: Spec) -> str:
    """` 2:4` or ` 16:32` where a support is balanced."""
    return f" {spec['balance'] // 2}:{spec['balance']}" if spec["balance"] else ""


def sizes(spec: Spec) -> str:
    """The format's own numbers: `K 288, s 152, K/s 1.89`, `identity 2:4, s 288 of 576, 4 bits`, `bits 4, group_size 128`."""
    if spec["format"] == "sparse_dictionary":
        learned, nonzeros, bits = spec["num_atoms"], spec["num_nonzeros"], spec["value_bits"]
        width = f", {bits} bits" if bits < 16 else ""
        if learned and spec["dictionary_bits"] < 16:
            width += f", atoms {spec['dictionary_bits']} bits"
        if not spec["unit_atoms"]:
            return f"K {learned}, s {nonzeros}, K/s {learned / nonzeros:.2f}{width}"
        kind = f"identity + {learned} atoms" if learned else "identity"
        return f"{kind}{balance(spec)}, s {nonzeros} of {spec['in_features'] + learned}{width}"
    said = {key: value for key, value in spec.items() if value and value != _NEUTRAL.get(key) and key not in _SHOWN}
    if not spec.get("high_features"):
        said.pop("high_bits", None)
    return ", ".join(key if value is True else f"{key} {value}" for key, value in said.items())
