"""The pipeline on one screen: open -> plan -> calibrate and compress block by block -> assemble -> publish.

Work in progress lives beside the output, in `.NAME.partial`: `run.json` says what is being made, `block-*.safetensors`
hold the packed tensors of finished blocks. Each file appears by a rename, so a run killed at any moment resumes after
its last finished block: finished blocks are replayed on the calibration inputs, which gives the same hidden states, and
the rest follows with the same bytes. The output directory appears by one rename at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compress import checkpoint
from compress.bases import rotated, write_cache_bases, write_rotated
from compress.blockwise import Progress, Silent, compress_blocks
from compress.calibrate import data
from compress.errors import CompressError
from compress.prepare import Prepared, prepare
from compress.recipe import Recipe
from compress.report import Report, peak_memory_bytes
from compress.rotation import RotatedSource
from compress.staging import open_staging
from compress.version import __version__


def run(
    model: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    texts: Sequence[str] | None = None,
    device: str = "auto",
    name: str | None = None,
    max_shard_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> Report:
    """Compress a model into a new directory; the same call resumes a run that was cut off.

    Args:
        model: hub id, local directory or .gguf file.
        output: must not exist; appears only when complete.
        texts: calibration texts, instead of the recipe's data set.
        name: what the report calls the model, where `model` is only a temporary place of it.
    Raises:
        CompressError: anything wrong with the input; nothing is left behind.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    output = Path(output).absolute()
    staging = output.with_name(f".{output.name}.partial")
    if output.exists():
        raise CompressError(f"{output} already exists{_finished_as(output, recipe)}; choose another -o or remove it")
    if not output.parent.is_dir():
        raise CompressError(f"{output.parent} does not exist; make it first")
    prepared = prepare(model, recipe, device)
    for note in prepared.plan.notes:
        progress.note(note)
    tokens = _tokens(prepared, texts)
    progress.note(f"calibrating on {tokens.count} tokens ({len(tokens.ids)} sequences) of {tokens.origin}")
    identity = {
        "model": prepared.source.fingerprint(),
        "recipe": recipe.digest(),
        "calibration tokens": tokens.digest(),
        "compute dtype": f"{prepared.dtype} on {prepared.device.type}",
        "version": __version__,
    }
    _require_space(prepared, output.parent)
    open_staging(staging, identity)
    try:
        prepared = rotated(prepared, tokens, staging, progress)
        modules = compress_blocks(prepared, tokens, staging, progress)
        report = Report(
            modules=modules,
            model=name or str(model),
            calibration={"origin": tokens.origin, "tokens": tokens.count, "sha256": tokens.digest()},
            versions=checkpoint.versions(),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(prepared.device),
            recipe=recipe.resolved(),
            identity=identity,
        )
        blocks = sorted(staging.glob("block-*.safetensors"))
        if isinstance(prepared.source, RotatedSource):
            packed = {f"{job.name}.weight" for job in prepared.plan.jobs}
            blocks += write_rotated(prepared.source, sorted(set(prepared.source.changed()) - packed), staging)
        if prepared.plan.cache:
            blocks += write_cache_bases(staging)
        report = checkpoint.assemble(
            prepared.source, prepared.plan, blocks, report, recipe, staging / "whole", max_shard_bytes
        )
        os.rename(staging / "whole", output)
    except BaseException as error:
        # Finished blocks are hours of work on a large model: only they are worth keeping, and only to be resumed.
        if isinstance(error, CompressError) or not any(staging.glob("block-*.safetensors")):
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)
    return report


def compress_model(
    model: str | Path | nn.Module,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    device: str = "auto",
) -> nn.Module:
    """Compress a model and return it loaded, ready for `generate`.

    Args:
        model: hub id, directory, .gguf file, or a transformers model in memory (then give its `tokenizer`).
        recipe: a shipped name, a YAML file, a dictionary or a `Recipe`.
        output: where the compressed checkpoint is kept; None keeps it in memory only.
        texts: calibration texts, instead of the recipe's data set.
        device: where to calibrate and solve: auto, cpu or cuda.
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
        run(model, recipe, kept, texts=texts, device=device, name=name)
        return checkpoint.load(kept)


def _tokens(prepared: Prepared, texts: Sequence[str] | None) -> data.Tokens:
    from transformers import AutoTokenizer

    options = prepared.recipe.calibration
    try:
        tokenizer = AutoTokenizer.from_pretrained(prepared.source.path)
    except (ValueError, OSError, KeyError) as error:
        raise CompressError(f"{prepared.source.path} holds no usable tokenizer") from error
    source = options.dataset if texts is None else texts
    return data.make_tokens(
        data.load_texts(source, config=options.config, split=options.split, column=options.column),
        tokenizer,
        samples=options.samples,
        length=options.length,
        seed=options.seed,
        layout=options.layout,
        chat_template=options.chat_template,
        origin=options.dataset if texts is None else f"{len(texts)} given texts",
    )


def _finished_as(output: Path, recipe: Recipe) -> str:
    try:
        identity = json.loads((output / "report.json").read_text())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    same = identity.get("recipe") == recipe.digest()
    return " and holds a finished run of this recipe" if same else " and holds a finished run of another recipe"


def _require_space(prepared: Prepared, folder: Path) -> None:
    """Block files and assembled shards exist together for a moment."""
    copied = sum(tensor.num_bytes for tensor in prepared.source.tensors.values())
    dense = sum(prepared.source.tensors[f"{job.name}.weight"].num_bytes for job in prepared.plan.jobs)
    needed = copied - dense + 2 * prepared.plan.packed_bytes + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CompressError(f"no space left: {folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")
