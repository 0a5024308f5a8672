"""lm-eval tasks on a model in memory, from the hub or from local files.

With `data`, a directory of `<task>/<split>.jsonl` in the hub's own row schema, each task keeps lm-eval's definition and
only its source is replaced, so that a machine without a network gets the same numbers. Names of groups and tags stand for
their tasks. A model with a KV cache of its own is read through it, as in `compress.evaluate.quality`; where that cache keeps
prompts exact, only tasks that generate show what it costs (`TaskResult.generates`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from compress.errors import CompressError
from compress.evaluate.quality import through_own_cache
from compress.fetch import hub_or_cache
from compress.suggest import unknown

_SPLITS = ("train", "validation", "test")
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass
class TaskResult:
    """What lm-eval says of one task: `{metric: value, metric_stderr: value}`, each document's part in a metric, what it is.

    A metric behind a filter is named as lm-eval does, `exact_match,strict-match`. Numbers that are not finite are None.
    """

    numbers: dict[str, float | None]
    by_document: dict[str, list[float]] = field(default_factory=dict)
    generates: bool = False  # else it compares likelihoods


def check_tasks(tasks: Sequence[str], data: str | Path | None = None, shots: int | None = None) -> list[str]:
    """The single tasks behind the names; nothing is computed yet.

    Raises:
        CompressError: an unknown task, or local files that lack a split that it needs.
    """
    names = list(dict.fromkeys(leaf for task in tasks for leaf in _leaves(task)))
    if data is not None:
        if not Path(data).is_dir():
            raise CompressError(f"--data {data} is no directory; expected one of TASK/SPLIT.jsonl")
        for name in names:
            _local_definition(name, Path(data), shots)
    return names


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> dict[str, TaskResult]:
    """Results by task; batch size 1, as many examples in the prompt as the task says unless `shots` does.

    Raises:
        CompressError: as `check_tasks`, or data that is neither in `data` nor on a reachable hub.
    """
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    names = check_tasks(tasks, data, shots)
    with _sources(names, data, shots) as (renamed, manager), through_own_cache(model):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        try:
            results = lm_eval.simple_evaluate(
                model=harness,
                tasks=list(renamed.values()),
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                bootstrap_iters=1000,
            )
        except (OSError, ConnectionError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CompressError(f"tasks {', '.join(names)}: {reason}; give local files with --data DIR") from error
    return {
        task: TaskResult(
            _numbers(results["results"][name]),
            _by_document(results["samples"][name]),
            generates=results["configs"][name]["output_type"] == "generate_until",
        )
        for task, name in renamed.items()
    }


@cache
def _known() -> Any:
    """lm-eval's index of its task definitions; building it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _leaves(name: str) -> list[str]:
    """The tasks that a name stands for: itself, or those of a tag or group."""
    index = _known().task_index
    if name not in index:
        raise CompressError(unknown("task", name, index)[:200])
    entry = index[name]
    if entry.kind.name not in ("TAG", "GROUP"):
        return [name]
    members = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task", [])
    if not members or not all(isinstance(member, str) for member in members):
        raise CompressError(f"{name} is a group whose tasks have no names of their own; name single tasks instead")
    return [leaf for member in members for leaf in _leaves(member)]


@contextmanager
def _sources(tasks: Sequence[str], data: str | Path | None, shots: int | None) -> Iterator[tuple[dict[str, str], Any]]:
    """`({task: name to run}, task manager)`: lm-eval's own tasks, or definitions that include them and read local files."""
    if data is None:
        with hub_or_cache():
            yield {task: task for task in tasks}, _known()
        return
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            text = yaml.safe_dump(_local_definition(task, Path(data), shots))
            (Path(folder) / f"{_local_name(task)}.yaml").write_text(text, encoding="utf-8")
        yield {task: _local_name(task) for task in tasks}, TaskManager(include_path=folder)


def _local_name(task: str) -> str:
    return f"{task}_local"


def _local_definition(task: str, data: Path, shots: int | None) -> dict[str, Any]:
    """A definition that includes lm-eval's own and takes every split from `data/<task>`."""
    entry = _known().task_index[task]
    config = entry.cfg or {}
    if entry.yaml_path is None:
        raise CompressError(f"task {task} is a program, which reads no local files; run it without --data")
    uses = {key: config[key] for key in _SPLIT_KEYS if config.get(key)}
    folder = data / task
    files = {split: folder / f"{split}.jsonl" for split in dict.fromkeys((*_SPLITS, *uses.values()))}
    files = {split: str(file.resolve()) for split, file in files.items() if file.is_file()}
    tested = [uses[key] for key in ("test_split", "validation_split") if key in uses]
    if not any(split in files for split in tested):
        raise CompressError(f"{folder} holds no {' or '.join(f'{split}.jsonl' for split in tested)} for task {task}")
    examples = shots if shots is not None else config.get("num_fewshot") or 0
    shown = uses.get("fewshot_split")
    if examples and shown and shown not in files:
        raise CompressError(
            f"task {task} shows {examples} examples of its {shown} split: put {shown}.jsonl into {folder}, or give --shots 0"
        )
    return {
        "include": str(entry.yaml_path),
        "task": _local_name(task),
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "num_fewshot": examples,
        **{key: None for key, split in uses.items() if split not in files},
    }


def _numbers(result: dict[str, Any]) -> dict[str, float | None]:
    numbers = {}
    for key, value in result.items():
        metric, _, filtered = key.partition(",")
        if not filtered or not isinstance(value, int | float):
            continue
        name = _name(metric.removesuffix("_stderr"), filtered)
        numbers[f"{name}_stderr" if metric.endswith("_stderr") else name] = float(value) if math.isfinite(value) else None
    return numbers


def _by_document(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each document's value of every metric that is one number per document."""
    values: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                values.setdefault(_name(metric, sample["filter"]), []).append(float(sample[metric]))
    return values


def _name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"
