"""The command line: five verbs over the Python functions, one table each.

Anything wrong with the input is one line on stderr and exit code 2. What a recipe can say has no flag here; `--set`
overrides any of its keys.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from compress.errors import CompressError

app = typer.Typer(
    help="Make a trained Hugging Face language model smaller and faster without training it again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

_INTERRUPTED = 130  # what typer returns after Ctrl-C when it does not exit by itself

out = Console()
if not out.is_terminal:
    out.width = max(out.width, 160)  # a pipe has no width: module names must not be cut to 80 columns
err = Console(stderr=True, soft_wrap=True)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. weights.ratio=0.3.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A shipped recipe's name or a YAML file.")]


class BarProgress:
    """Block, matrix, error and remaining time on a rich progress bar."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=err,
        )
        self.task: Any = None

    def __enter__(self) -> BarProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def start(self, matrices: int, done: int) -> None:
        self.task = self.bar.add_task("gathering statistics", total=matrices, completed=done)

    def matrix(self, module: Any) -> None:
        self.bar.update(self.task, advance=1, description=f"{module.name} error {module.error:.4f}")

    def count(self, total: int) -> Any:
        task = self.bar.add_task("windows", total=total)
        return lambda: self.bar.advance(task)


@app.command("model")
def model_command(
    recipe: RecipeName,
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local directory or .gguf file; may come from the recipe.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New directory for the compressed checkpoint.")
    ] = None,
    overrides: Set = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")] = False,
) -> None:
    """Calibrate, compress and save a model; the same command resumes a run that was cut off."""
    from compress.forecast import forecast_table
    from compress.prepare import prepare
    from compress.recipe import Recipe
    from compress.run import run

    checked = Recipe.load(recipe, overrides or ())
    name = model or checked.model
    if name is None:
        raise CompressError("no model: give MODEL, or a recipe with a `model` key")
    if dry_run:
        out.print(forecast_table(prepare(name, checked, device)))
        return
    if output is None:
        raise CompressError("no output: give -o DIR, or --dry-run to see the plan")
    with BarProgress() as progress:
        report = run(name, checked, output, device=device, progress=progress)
    out.print(report.table())
    out.print(f"saved to {output}", highlight=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint, or any model.")],
    against: Annotated[str | None, typer.Option(help="The original, measured on the same tokens.")] = None,
    dataset: Annotated[
        str, typer.Option(help="wikitext2, python-docs, a hub id, or a .txt/.jsonl/.parquet file.")
    ] = "wikitext2",
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first N windows.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma separated.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of TASK/SPLIT.jsonl, to run the tasks without the hub.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N documents of each task.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
    device: Device = "auto",
) -> None:
    """Perplexity, KL divergence, top-1 agreement and lm-eval tasks, original beside compressed."""
    from compress.evaluate import compare as comparison
    from compress.model import load_for_evaluation

    ours, tokenizer = load_for_evaluation(model, device)
    theirs = load_for_evaluation(against, device)[0] if against else None
    names = [task.strip() for task in tasks.split(",") if task.strip()]
    with BarProgress() as progress:
        result = comparison.compare(
            ours,
            tokenizer,
            theirs,
            dataset=dataset,
            split=split,
            length=length,
            windows=windows,
            tasks=names,
            data=data,
            limit=limit,
            progress=progress.count,
        )
    result.update(model=model, against=against)
    out.print(comparison.table(result))
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Format, sizes, bits per weight, bytes and error of every compressed matrix."""
    from compress.checkpoint import read_report
    from compress.report import megabytes, shown_error, sizes

    report = read_report(checkpoint)
    if as_json:
        out.print_json(json.dumps(report.to_dict()))
        return
    table = Table("module", "format", "shape", "sizes", "bits/weight", "bytes", "error")
    for module in report.modules:
        spec = module.spec
        shape = f"{spec['in_features']} -> {spec['out_features']}"
        numbers = (f"{module.bits_per_weight:.2f}", megabytes(module.packed_bytes), shown_error(module.error))
        table.add_row(module.name, spec["format"], shape, sizes(spec), *numbers)
    out.print(table)
    out.print(report.table())


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory.")],
    format: Annotated[str, typer.Option(help="dense: an ordinary bf16 checkpoint for any engine.")] = "dense",
) -> None:
    """Write the compressed model in a form that other tools read."""
    from compress.export import export_dense
    from compress.report import megabytes
    from compress.suggest import unknown

    if format != "dense":
        raise CompressError(unknown("format", format, ["dense"]))
    out.print(f"saved to {output}, {megabytes(export_dense(checkpoint, output))}", highlight=False)


@recipes_app.command("list")
def recipes_list() -> None:
    """Names and first lines of the shipped recipes."""
    from compress.recipe import read_text, shipped

    for name in shipped():
        out.print(f"{name:<22} {read_text(name).splitlines()[0].lstrip('# ')}", highlight=False, soft_wrap=True)


@recipes_app.command("show")
def recipes_show(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")], overrides: Set = None
) -> None:
    """The recipe with every default filled in."""
    from compress.recipe import Recipe

    out.print(Recipe.load(recipe, overrides or ()).to_yaml(), end="", highlight=False, markup=False)


@recipes_app.command("check")
def recipes_check(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")], overrides: Set = None
) -> None:
    """Check a recipe without a model."""
    from compress.recipe import Recipe

    checked = Recipe.load(recipe, overrides or ())
    out.print(f"{recipe} is valid: {', '.join(rule.method for rule in checked.weights)}", highlight=False)


def main() -> None:
    """Entry point of the console script: every expected failure is one line and exit code 2."""
    quiet_libraries()
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        status = _INTERRUPTED
    except CompressError as error:
        _fail(str(error))
    except OSError as error:  # no space left, no permission: the system's own words name the file
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it; anything else is our bug
            raise
        _fail(f"{error.format_message()} Try --help.")
    if status == _INTERRUPTED:
        _fail("interrupted; no output was made, and the same command goes on after the last finished block, if there is one")
    sys.exit(status if isinstance(status, int) else 0)


def quiet_libraries() -> None:
    """Our progress bar and errors are what a user reads; the libraries' own bars and hints would bury them."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _fail(message: str) -> None:
    err.print(f"compress: {' '.join(message.split())}", highlight=False, markup=False)
    sys.exit(2)
