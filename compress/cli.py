"""The command line: five verbs over the Python functions, one table each.

Anything wrong with the input is one line on stderr and exit code 2. What a recipe can say has no flag here; `--set`
overrides any of its keys. Commands import what they need when they run: torch and transformers take seconds.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from compress.console import BarProgress, err, out
from compress.errors import CompressError
from compress.version import __version__

app = typer.Typer(
    help="Make a trained Hugging Face language model smaller and faster without training it again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

_INTERRUPTED = 130  # what typer returns after Ctrl-C when it does not exit by itself

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. weights.ratio=0.3.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A shipped recipe's name or a YAML file.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"compress {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What stands before the verb."""


@app.command("model")
def model_command(
    recipe: RecipeName,
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local directory or .gguf file; may come from the recipe.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New or empty directory for the compressed checkpoint.")
    ] = None,
    overrides: Set = None,
    device: Device = "auto",
    trials_from: Annotated[
        Path | None,
        typer.Option(help="A checkpoint that a search made of this model at another size: nothing is tried again."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")] = False,
) -> None:
    """Calibrate, compress and save a model; the same command resumes a run that was cut off."""
    load_libraries()
    from compress.calibrate import data
    from compress.earlier import require_trials
    from compress.forecast import forecast_table
    from compress.prepare import prepare
    from compress.recipe import Recipe
    from compress.run import run

    checked = Recipe.load(recipe, overrides or ())
    name = model or checked.model
    if name is None:
        raise CompressError("no model: give MODEL, or a recipe with a `model` key")
    if dry_run:
        data.local_file(checked.calibration.dataset)
        prepared = prepare(name, checked, device)
        if trials_from is not None:
            require_trials(trials_from, prepared)
        out.print(forecast_table(prepared, trials=trials_from is None))
        return
    if output is None:
        raise CompressError("no output: give -o DIR, or --dry-run to see the plan")
    with BarProgress() as progress:
        try:
            report = run(name, checked, output, device=device, trials_from=trials_from, progress=progress)
        except KeyboardInterrupt:
            raise CompressError(f"interrupted; {_kept(output)}") from None
        except OSError as error:
            raise CompressError(f"{_system_error(error)}; {_kept(output)}") from error
    out.print(report.table())
    out.print(f"saved to {output}", highlight=False, markup=False)


def _kept(output: Path) -> str:
    """What a run that was cut off has left, for its last line."""
    from compress.staging import staging_of

    staging = staging_of(output)
    if not staging.exists():
        return "nothing was left behind"
    return f"no output was made; what is finished is kept in {staging}, and the same command goes on after it"


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint, or any model.")],
    against: Annotated[str | None, typer.Option(help="The original, measured on the same tokens.")] = None,
    dataset: Annotated[
        str,
        typer.Option(help="wikitext2, python-docs, a hub id, or a .txt/.jsonl/.parquet file; none measures only tasks."),
    ] = "wikitext2",
    config: Annotated[str | None, typer.Option(help="Configuration name of a hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    column: Annotated[str, typer.Option(help="Text column of .jsonl, .parquet and hub data.")] = "text",
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first N windows.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, groups or tags, comma separated.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of TASK/SPLIT.jsonl, to run the tasks without the hub.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N documents of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt, instead of the task's own number.")
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Read through this KV cache instead: a name (squat) or {method: squat, bits: 3}.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
    device: Device = "auto",
) -> None:
    """Perplexity, KL divergence, top-1 agreement and lm-eval tasks, original beside compressed."""
    load_libraries()
    from compress.cache.attached import attach
    from compress.calibrate import data as texts
    from compress.evaluate import compare as comparison
    from compress.evaluate.tasks import check_tasks
    from compress.model import load_for_evaluation
    from compress.prepare import choose_device
    from compress.source import open_source

    cache = _cache_options(kv_cache)
    names = [task.strip() for task in tasks.split(",") if task.strip()]
    if dataset == "none" and not names:
        raise CompressError("nothing to measure: give --tasks, or a --dataset")
    of_tasks = {"--data": data, "--limit": limit, "--shots": shots}
    given = next((option for option, value in of_tasks.items() if value is not None), None)
    if given and not names:
        raise CompressError(f"{given} is an option of tasks: give --tasks, for example --tasks piqa")
    texts.local_file(dataset)  # before models are loaded for nothing
    _require_writable(output)
    if names:
        names = check_tasks(names, data, shots)
    chosen = str(choose_device(device))
    sides = [open_source(side) for side in (model, against) if side]
    ours, tokenizer = load_for_evaluation(model, chosen)
    theirs, their_tokenizer = load_for_evaluation(against, chosen) if against else (None, tokenizer)
    if their_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise CompressError(
            f"{against} has another vocabulary than {model}; give --against the model it was compressed from"
        )
    if cache:
        attach(ours, *cache)
    sizes = [sum(tensor.num_bytes for tensor in side.tensors.values()) for side in sides]
    with BarProgress() as progress:
        result = comparison.compare(
            ours,
            tokenizer,
            theirs,
            dataset=None if dataset == "none" else dataset,
            config=config,
            split=split,
            column=column,
            length=length,
            windows=windows,
            tasks=names,
            data=data,
            limit=limit,
            shots=shots,
            checkpoint_bytes=(sizes[0], sizes[1] if against else None),
            progress=progress.count,
        )
    result.update(model=model, against=against)
    try:
        if output:  # first: the screen may be a pipe that nobody reads any more
            output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    finally:
        out.print(comparison.table(result))


def _cache_options(text: str | None) -> tuple[str, dict] | None:
    """Method and checked options of `--kv-cache`."""
    from compress.cache import read_config
    from compress.recipe import yaml_mapping

    if text is None:
        return None
    bare = text.strip()  # a method and its defaults, or a mapping
    options = {"method": bare} if bare.isidentifier() else yaml_mapping(text, "--kv-cache")
    method = options.pop("method", "per_token")
    return method, read_config(method, options).model_dump()


def _require_writable(output: Path | None) -> None:
    """Hours of measuring must not end at a folder that is not there."""
    if output is None:
        return
    if output.is_dir():
        raise CompressError(f"{output} is a directory; give -o a file, for example {output / 'figures.json'}")
    if not output.absolute().parent.is_dir():
        raise CompressError(f"{output.absolute().parent} does not exist; make it first")
    if not os.access(output if output.exists() else output.absolute().parent, os.W_OK):
        raise CompressError(f"{output} cannot be written; choose another -o")


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw bits and errors by block into this .png, .svg or .pdf.")] = None,
) -> None:
    """Format, sizes, bits per weight, bytes and error of every compressed matrix."""
    load_libraries()
    from compress.checkpoint import read_report
    from compress.picture import draw
    from compress.report import megabytes, shown_error, sizes

    report = read_report(checkpoint)
    if plot:
        draw(report, plot)
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
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty directory.")],
    format: Annotated[str, typer.Option(help="dense: an ordinary bf16 checkpoint for any engine.")] = "dense",
) -> None:
    """Write the compressed model in a form that other tools read."""
    load_libraries()
    from compress.export import export_dense
    from compress.report import megabytes
    from compress.suggest import unknown

    if format != "dense":
        raise CompressError(unknown("format", format, ["dense"]))
    out.print(f"saved to {output}, {megabytes(export_dense(checkpoint, output))}", highlight=False, markup=False)


@recipes_app.command("list")
def recipes_list() -> None:
    """Names and first lines of the shipped recipes."""
    from compress.shipped import read_text, shipped

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
    """Every expected failure is one line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign must not cost the figures
    try:
        status = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        status = _INTERRUPTED
    except CompressError as error:
        _fail(str(error))
    except OSError as error:  # no space left, no permission: the system's own words name the file
        _fail(_system_error(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it; anything else is our bug
            raise
        message = error.format_message()
        if not message:  # no verb: the help has been shown
            sys.exit(2)
        _fail(f"{message} Try --help.")
    if status == _INTERRUPTED:
        _fail("interrupted")
    sys.exit(status if isinstance(status, int) else 0)


def _system_error(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def load_libraries() -> None:
    """Register the format with transformers, and quieten it: its bars and hints would bury what a user must read."""
    from transformers.utils import logging as transformers_logging

    import compress.hf  # noqa: F401

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for library in ("datasets", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _fail(message: str) -> None:
    err.print(f"compress: {' '.join(message.split())}", highlight=False, markup=False)
    sys.exit(2)
