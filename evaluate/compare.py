"""`compress evaluate`: one JSON-ready result and one table, the original beside the compressed model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from compress.evaluate.quality import measure
from compress.evaluate.tasks import run_tasks
from compress.evaluate.text import make_windows


def compare(
    model: nn.Module,
    tokenizer: Any,
    original: nn.Module | None = None,
    *,
    dataset: str = "wikitext2",
    split: str = "test",
    length: int = 2048,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> dict[str, Any]:
    """Quality of both models on the same windows and tasks.

    Args:
        windows: the first so many windows; None takes the whole text.
        data, limit: see `run_tasks`.
        progress: called with the number of windows, returns what to call after each.
    """
    tokens = make_windows(dataset, tokenizer, length=length, limit=windows, split=split)
    ours, theirs = measure(model, tokens.ids, original, progress(len(tokens.ids)))
    result: dict[str, Any] = {
        "protocol": {
            "dataset": dataset,
            "split": split,
            "length": length,
            "windows": len(tokens.ids),
            "notes": list(tokens.notes),
        },
        "compressed": {"quality": ours.summary()},
        "threads": torch.get_num_threads(),
    }
    if theirs is not None:
        result["original"] = {"quality": theirs.summary()}
        difference = ours.nll - theirs.nll  # paired: the same windows
        result["loss_difference"] = float(difference.mean())
        if len(difference) > 1:
            result["loss_difference_stderr"] = float(difference.std() / math.sqrt(len(difference)))
    if tasks:
        result["compressed"]["tasks"] = run_tasks(model, tokenizer, tasks, data=data, limit=limit)
        if original is not None:
            result["original"]["tasks"] = run_tasks(original, tokenizer, tasks, data=data, limit=limit)
    return result


def table(result: dict[str, Any]) -> Table:
    """Original, compressed, difference; values with their standard errors."""
    protocol = result["protocol"]
    title = f"{protocol['dataset']} {protocol['split']}, {protocol['windows']} windows of {protocol['length']} tokens"
    table = Table("", "original", "compressed", "difference", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, before, after in _pairs(result):
        change = "" if before is None or after is None else f"{after[0] - before[0]:+.4g}"
        table.add_row(label, _shown(before), _shown(after), change)
    return table


def _pairs(result: dict[str, Any]) -> list[tuple[str, tuple | None, tuple | None]]:
    sides = [result.get("original"), result["compressed"]]
    rows: list[tuple[str, tuple | None, tuple | None]] = []
    for key, label in (("perplexity", "perplexity"), ("kl", "KL divergence (nats)"), ("top1_agreement", "top-1 agreement")):
        values = [_value(side["quality"], key) if side else None for side in sides]
        if any(values):
            rows.append((label, *values))
    for task, metrics in sides[1].get("tasks", {}).items():
        for metric in [name for name in metrics if not name.endswith("_stderr")]:
            rows.append((f"{task} {metric}", *[_value(side["tasks"][task], metric) if side else None for side in sides]))
    return rows


def _value(numbers: dict[str, float], key: str) -> tuple[float, float] | None:
    return (numbers[key], numbers.get(f"{key}_stderr", math.nan)) if key in numbers else None


def _shown(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{value[0]:.4g}" + ("" if math.isnan(value[1]) else f" ± {value[1]:.2g}")
