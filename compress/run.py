"""The pipeline on one screen: open -> plan -> rotate -> search -> calibrate and compress by blocks -> assemble -> publish.

Work in progress lives beside the output, in `.NAME.partial`: `run.json` says what is being made, `block-*.safetensors`
hold the packed tensors of finished blocks (`compress.staging`). Each file appears by a rename, so a run killed at any
moment resumes after its last finished block: finished blocks are replayed on the calibration inputs, which gives the same
hidden states, and the rest follows with the same bytes. The output directory appears by one rename at the end.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from compress import checkpoint
from compress.allocation import SENSITIVITY, allocated, find, is_found
from compress.bases import rotated, write_cache_bases, write_rotated
from compress.blockwise import Progress, Silent, compress_blocks
from compress.calibrate import data
from compress.earlier import read_earlier, require_trials
from compress.errors import CompressError
from compress.forecast import size_notes, states_bytes
from compress.forms import open_jobs
from compress.lineage import Lineage, model_identity
from compress.memory import peak_memory_bytes
from compress.model import require_fits
from compress.passes import STATES, Passes
from compress.plan import HEAD, planned_bytes
from compress.prepare import Prepared, prepare
from compress.recipe import Recipe
from compress.report import Report
from compress.rotation import RotatedSource
from compress.source import ALLOCATION
from compress.staging import (
    BASES,
    TRIED,
    check_bases,
    check_blocks,
    forget_finished,
    identity_of,
    is_vacant,
    locked,
    open_staging,
    publish,
    staging_of,
)


def run(
    model: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    texts: Sequence[str] | None = None,
    device: str = "auto",
    name: str | None = None,
    trials_from: str | Path | None = None,
    max_shard_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> Report:
    """Compress a model into a new or empty directory; the same call resumes a run that was cut off.

    Args:
        model: hub id, local directory or .gguf file.
        output: must not exist, or be an empty directory; its files appear together, when complete.
        texts: calibration texts, instead of the recipe's data set.
        name: what the report calls the model, where `model` is only a temporary place of it.
        trials_from: a checkpoint that a search has made of the same model at another size; its trials are used again.
    Raises:
        CompressError: anything wrong with the input; nothing is left behind.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    output = Path(output).absolute()
    if not output.name:
        raise CompressError(f"{output} is no place for a checkpoint; give a new directory")
    staging = staging_of(output)
    recipe = recipe.model_copy(update={"model": name or str(model)})  # the recipe.yaml of the result repeats this run
    _require_new(output, recipe)
    if texts is None:
        data.local_file(recipe.calibration.dataset)  # before a model is fetched for nothing
    prepared = prepare(model, recipe, device)
    if trials_from is not None:
        require_trials(Path(trials_from), prepared)
    for note in (*prepared.plan.notes, *size_notes(prepared.plan)):
        progress.note(note)
    tokens = _tokens(prepared, texts)
    require_fits(prepared.model, tokens.ids, "lower calibration.length")
    for note in (f"calibrating on {tokens.count} tokens ({len(tokens.ids)} sequences) of {tokens.origin}", *tokens.notes):
        progress.note(note)
    _require_space(prepared, staging, passes=trials_from is None)
    lineage, earlier = Lineage(prepared.source, prepared.plan), None
    identity = _identity(prepared, tokens, lineage)
    if trials_from is not None:
        earlier = read_earlier(Path(trials_from), prepared, identity, lineage)
        identity["trials"] = earlier.digest
        progress.note(f"the trials are those of {trials_from}")
    with locked(staging), _worth_keeping(staging, refused=True):
        _require_new(output, recipe)  # another process may have finished it since
        open_staging(staging, identity)
        check_bases(staging, lineage)
        with _worth_keeping(staging, refused=False):
            prepared = rotated(prepared, tokens, staging, lineage, progress)
            find(prepared, tokens, staging, progress, earlier)  # on the rotated model: there errors are what they will be
        prepared = allocated(prepared, tokens, staging)
        check_blocks(staging, prepared.plan, lineage)
        with _worth_keeping(staging, refused=False):
            modules = compress_blocks(prepared, tokens, staging, lineage, progress)
            report = Report(
                modules=modules,
                model=name or str(model),
                calibration={
                    "origin": tokens.origin,
                    "tokens": tokens.count,
                    "sha256": tokens.digest(),
                    "notes": list(tokens.notes),
                },
                versions=checkpoint.versions(),
                seconds=time.perf_counter() - started,
                peak_memory_bytes=peak_memory_bytes(prepared.device),
                recipe=recipe.resolved(),
                identity=identity,
                made_from=lineage.of(HEAD),
                trials_from="" if trials_from is None else Path(trials_from).absolute().name,
            )
            report = _assemble(prepared, report, staging, max_shard_bytes)
            publish(staging / "whole", output)
        shutil.rmtree(staging, ignore_errors=True)
    return report


@contextmanager
def _worth_keeping(staging: Path, *, refused: bool) -> Iterator[None]:
    """On failure, keep only what a resumed run can use: finished blocks, bases and trials, which are hours of work on a
    large model, and what was found by them. Where an error of ours may mean that what is there is refused, that is left."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, CompressError) and refused:
            raise
        finished = [path for what in ("block-*.safetensors", SENSITIVITY, TRIED, BASES) for path in staging.glob(what)]
        if isinstance(error, CompressError) or not finished:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _assemble(prepared: Prepared, report: Report, staging: Path, max_shard_bytes: int) -> Report:
    blocks = sorted(staging.glob("block-*.safetensors"))
    if isinstance(prepared.source, RotatedSource):
        packed = {f"{job.name}.weight" for job in prepared.plan.jobs}
        blocks += write_rotated(prepared.source, sorted(set(prepared.source.changed()) - packed), staging)
    if prepared.plan.cache:
        blocks += write_cache_bases(staging)
    report = checkpoint.assemble(
        prepared.source, prepared.plan, blocks, report, prepared.recipe, staging / "whole", max_shard_bytes
    )
    if (staging / ALLOCATION).exists():
        shutil.copyfile(staging / ALLOCATION, staging / "whole" / ALLOCATION)
    return report


def compress_model(
    model: str | Path | nn.Module,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    device: str = "auto",
    trials_from: str | Path | None = None,
) -> nn.Module:
    """Compress a model and return it loaded, ready for `generate`.

    Args:
        model: hub id, directory, .gguf file, or a transformers model in memory (then give its `tokenizer`).
        recipe: a shipped name, a YAML file, a dictionary or a `Recipe`.
        output: where the compressed checkpoint is kept; None keeps it in memory only.
        texts: calibration texts, instead of the recipe's data set.
        device: where to calibrate and solve: auto, cpu or cuda.
        trials_from: a checkpoint that a search has made of the same model at another size; its trials are used again.
    Raises:
        CompressError: as the command line would print.
    """
    if isinstance(recipe, dict):
        recipe = Recipe.from_dict(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    name = None
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, nn.Module):
            name = model.config.name_or_path or f"{type(model).__name__} in memory"
            if tokenizer is None:
                raise CompressError("a model in memory needs tokenizer=..., to read the calibration text")
            model.save_pretrained(Path(scratch) / "model")
            tokenizer.save_pretrained(Path(scratch) / "model")
            model = Path(scratch) / "model"
        kept = Path(output) if output is not None else Path(scratch) / "compressed"
        run(model, recipe, kept, texts=texts, device=device, name=name, trials_from=trials_from)
        return checkpoint.load(kept)


def _tokens(prepared: Prepared, texts: Sequence[str] | None) -> data.Tokens:
    from transformers import AutoTokenizer

    options = prepared.recipe.calibration
    if isinstance(texts, str):
        raise CompressError("texts: expected a list of strings, got one string; write texts=[...]")
    try:
        tokenizer = AutoTokenizer.from_pretrained(prepared.source.path)
    except (ValueError, OSError, KeyError) as error:
        raise CompressError(f"{prepared.source.path} holds no usable tokenizer") from error
    source = options.dataset if texts is None else texts
    rows = data.load_texts(
        source, config=options.config, split=options.split, column=options.column, chat=options.chat_template
    )
    return data.make_tokens(
        rows,
        tokenizer,
        samples=options.samples,
        length=options.length,
        seed=options.seed,
        layout=options.layout,
        chat_template=options.chat_template,
        origin=options.dataset if texts is None else f"{len(rows)} given texts",
    )


def _identity(prepared: Prepared, tokens: data.Tokens, lineage: Lineage) -> dict[str, str]:
    """Everything that decides the bytes of the result; two runs that differ in any of it do not continue each other."""
    versions, found = checkpoint.versions(), Passes(prepared, open_jobs(prepared.plan), tokens.count).needed
    return {
        "model": model_identity(prepared.source, prepared.plan),
        **({"block weights": lineage.of(HEAD)} if found else {}),  # what passes find out depends on all of them
        "recipe": prepared.recipe.digest(),
        "calibration tokens": tokens.digest(),
        "compute dtype": f"{prepared.dtype} on {prepared.device.type}",
        **{f"{package} version": versions[package] for package in ("compress", "torch", "transformers")},
    }


def _require_new(output: Path, recipe: Recipe) -> None:
    if is_vacant(output):
        if not output.parent.is_dir():
            raise CompressError(f"{output.parent} does not exist; make it first")
        return
    forget_finished(staging_of(output), output)
    finished = ""
    digest = identity_of(output).get("recipe")
    if digest:
        finished = f" and holds a finished run of {'this' if digest == recipe.digest() else 'another'} recipe"
    raise CompressError(f"{output} already exists{finished}; choose another -o or remove it")


def _require_space(prepared: Prepared, staging: Path, *, passes: bool) -> None:
    """Block files and assembled shards exist together for a moment; hidden states of passes only before them."""
    copied, packed = prepared.source.stored_bytes - prepared.replaced_bytes, sum(map(planned_bytes, prepared.plan.jobs))
    states = states_bytes(prepared) if passes and not is_found(staging, open_jobs(prepared.plan)) else 0
    needed = max(copied + 2 * packed, states) + (64 << 20)
    free = shutil.disk_usage(staging.parent).free
    free += sum(file.stat().st_size for file in staging.glob(f"{STATES}/*"))  # of a run that was cut off: written again
    if free < needed:
        raise CompressError(
            f"no space left: {staging.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed"
        )
