"""What the command line writes, and where: results and notes on stdout, progress and one line of error on stderr."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console()
if not out.is_terminal:
    out.width = max(out.width, 160)  # a pipe has no width: module names must not be cut to 80 columns
err = Console(stderr=True, soft_wrap=True)


class BarProgress:
    """Block, matrix, error and remaining time on a bar, which appears with the first work and only on a terminal."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=err,
            disable=not err.is_terminal,
            redirect_stdout=out.is_terminal,  # a pipe gets the notes, whatever is on the screen
        )
        self.task: Any = None

    def __enter__(self) -> BarProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.task is not None:
            self.bar.stop()

    def note(self, text: str) -> None:
        out.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, matrices: int, done: int) -> None:
        self._begin("gathering statistics", matrices, done)

    def matrix(self, module: Any) -> None:
        self._one_more("matrices compressed", f"{module.name} error {module.error:.4f}")

    def count(self, total: int, what: str = "windows") -> Callable[[], None]:
        """A bar, or a line at every fifth where there is no terminal; call what it returns after each."""
        self._begin(what, total, 0)
        return partial(self._one_more, what, what)

    def _begin(self, description: str, total: int, done: int) -> None:
        self.bar.start()
        self.task = self.bar.add_task(description, total=total, completed=done)

    def _one_more(self, what: str, description: str) -> None:
        self.bar.update(self.task, advance=1, description=description)
        task = next(task for task in self.bar.tasks if task.id == self.task)
        done, total = int(task.completed), int(task.total)
        if not err.is_terminal and done * 5 // total > (done - 1) * 5 // total:
            err.print(f"{done} of {total} {what}", highlight=False)
