"""lm-eval tasks on a model in memory, from the hub or from local files.

With `data`, a directory of `<task>/<split>.jsonl` in the hub's own row schema, each task keeps lm-eval's definition and
only its source is replaced, so that a machine without a network gets the same numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from compress.errors import CompressError
from compress.suggest import unknown

_SPLITS = ("train", "validation", "test")


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, data: str | Path | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """`{task: {metric: value, metric_stderr: value}}`; batch size 1, zero-shot unless the task says otherwise.

    Raises:
        CompressError: an unknown task, or one whose data is neither in `data` nor on a reachable hub.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = TaskManager()
    for task in tasks:
        if task not in known.all_tasks:
            raise CompressError(unknown("task", task, known.all_tasks)[:200])
    with _local_tasks(known, tasks, data) as names:
        manager = TaskManager(include_path=names[1]) if names[1] else known
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        try:
            results = lm_eval.simple_evaluate(
                model=harness, tasks=list(names[0].values()), task_manager=manager, limit=limit, bootstrap_iters=1000
            )
        except (OSError, ConnectionError, ValueError) as error:
            raise CompressError(f"tasks: {' '.join(str(error).split())[:200]}; give local files with --data") from error
    return {task: _numbers(results["results"][name]) for task, name in names[0].items()}


@contextmanager
def _local_tasks(known: Any, tasks: Sequence[str], data: str | Path | None) -> Iterator[tuple[dict[str, str], str | None]]:
    """Task definitions that include lm-eval's own and read local files; yields `({task: name to run}, their folder)`."""
    if data is None:
        yield {task: task for task in tasks}, None
        return
    with tempfile.TemporaryDirectory() as folder:
        names = {}
        for task in tasks:
            files = {split: Path(data) / task / f"{split}.jsonl" for split in _SPLITS}
            files = {split: str(file.resolve()) for split, file in files.items() if file.is_file()}
            if not files:
                raise CompressError(f"{Path(data) / task} holds no test.jsonl or validation.jsonl for task {task}")
            names[task] = f"{task}_local"
            definition = {
                "include": str(_definition(known, task)),
                "task": names[task],
                "tag": [],
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files},
            }
            definition.update(
                {f"{'training' if split == 'train' else split}_split": None for split in _SPLITS if split not in files}
            )
            (Path(folder) / f"{names[task]}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
        yield names, folder


def _definition(known: Any, task: str) -> Path:
    entry = known.task_index[task]
    return Path(entry["yaml_path"] if isinstance(entry, dict) else entry.yaml_path)


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if isinstance(value, int | float) and key.endswith(",none")
    }
