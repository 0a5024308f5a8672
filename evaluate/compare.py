"""`compress evaluate`: one JSON-ready result and one table, the original beside the compressed model.

    {"protocol": ..., "environment": ..., "compressed": {"quality", "tasks", "checkpoint_bytes", "bits", "decoding"},
     "original": the same without bits,
     "difference": {"quality": {figure, figure_stderr}, "tasks": {task: {metric, metric_stderr}}}}

Differences are compressed less original, their standard errors those of paired values (the same windows, the same
documents); a figure that is no mean over documents has a difference without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from compress.cache.attached import new_cache
from compress.calibrate.data import local_file
from compress.checkpoint import versions
from compress.errors import CompressError
from compress.evaluate.quality import differences, empty_cache, finite, mean_and_error, measure
from compress.evaluate.speed import decoding_speed
from compress.evaluate.tasks import TaskResult, run_tasks
from compress.evaluate.text import make_windows
from compress.layers import compressed_matrices
from compress.model import require_fits
from compress.report import Report, megabytes

_FIGURES = {"perplexity": "perplexity", "kl": "KL divergence (nats)", "top1_agreement": "top-1 agreement"}
_BITS = {
    "bits_per_weight": "bits of a compressed weight",
    "bits_per_activation": "bits of an activation",
    "bits_per_key_or_value": "bits of a key or value",
}
_DECODING = {
    "tokens_per_second": ("decoding, tokens per second", 1),
    "cache_bytes": ("KV cache of one window, MB", 1e6),
    "peak_memory_bytes": ("peak memory of the process, MB", 1e6),
}
_OF_THE_ORIGINAL = {"kl": 0.0, "top1_agreement": 1.0}  # by definition


def compare(
    model: nn.Module,
    tokenizer: Any,
    original: nn.Module | None = None,
    *,
    dataset: str | Sequence[str] | None = "wikitext2",
    config: str | None = None,
    split: str = "test",
    column: str = "text",
    length: int = 2048,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    checkpoint_bytes: tuple[int, int | None] | None = None,
    progress: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> dict[str, Any]:
    """Quality of both models on the same windows and tasks.

    Args:
        dataset, config, split, column: the text; None measures tasks only.
        windows: the first so many windows; None takes the whole text.
        data, limit, shots: see `run_tasks`.
        checkpoint_bytes: sizes on disk of the model and of the original.
        progress: called with the number of windows, returns what to call after each.
    Raises:
        CompressError: models of different vocabularies, or anything wrong with the text or the tasks.
    """
    if original is not None:
        _require_same_vocabulary(model, original)
    own = empty_cache(model)
    if own is not None and not own.reads_in_one_pass:
        own = new_cache(model)  # decoded as it would be used
    result: dict[str, Any] = {
        "protocol": {
            "kv_cache": None if own is None else own.spec,
            "decoded": dataset is not None and own is not None and not own.reads_in_one_pass,
        },
        "environment": _environment(model),
        "compressed": {},
    }
    if matrices := compressed_matrices(model):
        result["compressed"]["bits"] = Report.of_specs(matrices, 0, 0).bits()
    if original is not None:
        result["original"], result["difference"] = {}, {}
    for side, size in zip(("compressed", "original"), checkpoint_bytes or (), strict=False):
        if size is not None:
            result[side]["checkpoint_bytes"] = size
    if dataset is not None:
        tokens = make_windows(dataset, tokenizer, length=length, limit=windows, split=split, config=config, column=column)
        require_fits(model, tokens.ids, "lower --length")
        file = isinstance(dataset, str) and local_file(dataset)  # which has no splits
        result["protocol"] |= {
            "dataset": tokens.origin, "config": None if file else config, "split": None if file else split, "column": column,
            "length": length, "windows": len(tokens.ids), "tokens": tokens.count, "notes": list(tokens.notes),
        }  # fmt: skip
        ours, theirs = measure(model, tokens.ids, original, progress(len(tokens.ids)))
        result["compressed"]["quality"] = ours.summary()
        if theirs is not None:
            result["original"]["quality"] = theirs.summary() | _OF_THE_ORIGINAL
            result["difference"]["quality"] = differences(ours, theirs)
        if own is not None:
            for side, which in (("original", original), ("compressed", model)):
                if which is not None:
                    result[side]["decoding"] = decoding_speed(which, tokens.ids[0])
    if tasks:
        result["environment"]["versions"]["lm_eval"] = metadata.version("lm-eval")
        result["protocol"] |= {"limit": limit, "shots": shots, "task_data": None if data is None else str(data)}
        ours_by_task = run_tasks(model, tokenizer, tasks, data=data, limit=limit, shots=shots)
        result["compressed"]["tasks"] = {task: found.numbers for task, found in ours_by_task.items()}
        if own is not None and not own.reads_in_one_pass:  # a prompt is exact there, and a likelihood is all prompt
            result["protocol"]["past_the_cache"] = [task for task, found in ours_by_task.items() if not found.generates]
        if original is not None:
            theirs_by_task = run_tasks(original, tokenizer, tasks, data=data, limit=limit, shots=shots)
            result["original"]["tasks"] = {task: found.numbers for task, found in theirs_by_task.items()}
            result["difference"]["tasks"] = {
                task: task_differences(found, theirs_by_task[task]) for task, found in ours_by_task.items()
            }
    return result


def _require_same_vocabulary(model: nn.Module, original: nn.Module) -> None:
    ours, theirs = (side.config.get_text_config(decoder=True).vocab_size for side in (model, original))
    if ours != theirs:
        raise CompressError(
            f"the original has a vocabulary of {theirs} tokens, the model one of {ours}; give --against the model it was "
            "compressed from"
        )


def _environment(model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        "versions": versions(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def task_differences(ours: TaskResult, theirs: TaskResult) -> dict[str, float | None]:
    """`ours` less `theirs` in every metric; paired errors where the metric is the mean of its documents' values."""
    result: dict[str, float | None] = {}
    for metric, value in ours.numbers.items():
        other = theirs.numbers.get(metric)
        if metric.endswith("_stderr"):
            continue
        result[metric] = None if value is None or other is None else finite(value - other)
        pairs = [torch.tensor(side.by_document.get(metric, ()), dtype=torch.float64) for side in (ours, theirs)]
        error = None
        if len(pairs[0]) == len(pairs[1]) > 0 and result[metric] is not None:
            mean, paired = mean_and_error(pairs[0] - pairs[1])
            error = paired if mean is not None and abs(mean - result[metric]) < 1e-6 else None
        result[f"{metric}_stderr"] = error
    return result


def table(result: dict[str, Any]) -> Table:
    """Original, compressed, difference, each with its standard error, or one column where there is no original; below, what
    was left out."""
    protocol = result["protocol"]
    alone = "original" not in result
    heads = (
        ["compressed" if "bits" in result["compressed"] else "model"] if alone else ["original", "compressed", "difference"]
    )
    table = Table("", *heads, title=_title(protocol))
    if protocol.get("notes"):
        table.caption = "\n".join(protocol["notes"])
    for column in table.columns[1:]:
        column.justify = "right"
    sides = [result.get("original", {}), result["compressed"], result.get("difference", {})]

    def add_row(label: str, *cells: str) -> None:
        table.add_row(label, *(cells[1:2] if alone else cells))

    for key, label in _FIGURES.items():
        cells = [_shown(side.get("quality", {}), key, sign=side is sides[2]) for side in sides]
        if cells[1]:
            add_row(label, *cells)
    for task, metrics in sides[1].get("tasks", {}).items():
        for metric in [name for name in metrics if not name.endswith("_stderr")]:
            cells = [_shown(side.get("tasks", {}).get(task, {}), metric, sign=side is sides[2]) for side in sides]
            add_row(f"{task} {metric}", *cells)
    bits = {**sides[1].get("bits", {}), **sides[1].get("quality", {})}
    for key, label in _BITS.items():
        if key in bits:
            add_row(label, "", f"{bits[key]:.2f}", "")
    for key, (label, unit) in _DECODING.items():
        cells = [side["decoding"][key] / unit if side.get("decoding", {}).get(key) else None for side in sides[:2]]
        if cells[1]:
            add_row(label, *("" if cell is None else f"{cell:.4g}" for cell in cells), "")
    before, after = (side.get("checkpoint_bytes") for side in sides[:2])
    if after is not None:
        change = f"{100 * (after / before - 1):+.1f} %" if before else ""
        add_row("checkpoint", megabytes(before) if before else "", megabytes(after), change)
    return table


def _title(protocol: dict[str, Any]) -> str:
    parts = []
    if "dataset" in protocol:
        text = " ".join(filter(None, (protocol["dataset"], protocol["split"])))
        parts.append(f"{text}, {protocol['windows']} windows of {protocol['length']} tokens")
    if protocol["kv_cache"]:
        cache = protocol["kv_cache"]
        parts.append(f"keys and values read through the {cache['method']} cache, {cache['bits']}-bit setting")
    if protocol["decoded"]:
        parts.append("the second half of each window, token by token")
    if tasks := protocol.get("past_the_cache"):
        parts.append(f"{', '.join(tasks)}: likelihoods of whole prompts, of which that cache packs nothing")
    return "; ".join(parts)


def _shown(numbers: dict[str, float | None], key: str, *, sign: bool) -> str:
    if key not in numbers:
        return ""
    value, error = numbers[key], numbers.get(f"{key}_stderr")
    if value is None:
        return "not finite"
    return f"{value:{'+' if sign else ''}.4g}" + ("" if error is None else f" ± {error:.2g}")
