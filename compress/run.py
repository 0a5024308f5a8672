"""The pipeline on one screen: open -> plan -> calibrate and compress block by block -> assemble -> publish.

Work in progress lives beside the output, in `.NAME.partial`: `run.json` says what is being made, `block-*.safetensors`
hold the packed tensors of finished blocks. Each file appears by a rename, so a run killed at any moment resumes after
its last finished block: finished blocks are replayed on the calibration inputs, which gives the same hidden states, and
the rest follows with the same bytes. The output directory appears by one rename at the end.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress import checkpoint, methods
from compress.calibrate import data
from compress.calibrate.blocks import BlockRunner
from compress.calibrate.statistics import Gram
from compress.errors import CompressError
from compress.layers import build
from compress.linalg import SecondMoment
from compress.model import Source, build_skeleton, materialise, open_source, release, require_compressible
from compress.plan import HEAD, Job, Plan, make_plan
from compress.recipe import Recipe
from compress.report import ModuleReport, Report, peak_memory_bytes
from compress.tensorfile import read_header, write_file, write_whole
from compress.version import __version__

_BATCH_TOKENS = 4096  # tokens fed at once: enough to keep matrix products busy, little enough to be no burden


class Progress(Protocol):
    """What a run tells whoever watches; every method may do nothing."""

    def note(self, text: str) -> None: ...
    def start(self, matrices: int, done: int) -> None: ...
    def matrix(self, module: ModuleReport) -> None: ...


class Silent:
    """A progress that shows nothing."""

    def note(self, text: str) -> None:
        pass

    def start(self, matrices: int, done: int) -> None:
        pass

    def matrix(self, module: ModuleReport) -> None:
        pass


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked and could start."""

    source: Source
    model: nn.Module
    recipe: Recipe
    plan: Plan
    device: torch.device
    dtype: torch.dtype


def prepare(model: str | Path, recipe: Recipe, device: str = "auto") -> Prepared:
    """Open the model and resolve the recipe against it; reads no weights and writes nothing."""
    source = open_source(model)
    require_compressible(source)
    skeleton = build_skeleton(source.path)
    chosen = choose_device(device)
    plan = make_plan(skeleton, source, recipe)
    stored = source.tensors[f"{plan.jobs[0].name}.weight"].dtype
    return Prepared(source, skeleton, recipe, plan, chosen, compute_dtype(chosen, stored))


def choose_device(device: str) -> torch.device:
    """`auto` is the first GPU if there is one; CompressError for a device that torch does not offer here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise CompressError(f"unknown device {device!r}; use auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CompressError("device cuda: torch finds no GPU here; use --device cpu")
    return chosen


def compute_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Dtype of the calibration forward passes: as stored where the hardware multiplies it, else fp32."""
    if device.type == "cuda" or stored not in (torch.bfloat16, torch.float16):
        return stored if stored != torch.float64 else torch.float32
    native = stored == torch.bfloat16 and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32


def run(
    model: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    texts: Sequence[str] | None = None,
    device: str = "auto",
    max_shard_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> Report:
    """Compress a model into a new directory; the same call resumes a run that was cut off.

    Args:
        model: hub id, local directory or .gguf file.
        output: must not exist; appears only when complete.
        texts: calibration texts, instead of the recipe's data set.
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
    _open_staging(staging, identity)
    try:
        modules = _compress_blocks(prepared, tokens, staging, progress)
        report = Report(
            modules=modules,
            model=str(model),
            calibration={"origin": tokens.origin, "tokens": tokens.count, "sha256": tokens.digest()},
            versions=checkpoint.versions(),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(prepared.device),
            recipe=recipe.resolved(),
            identity=identity,
        )
        blocks = sorted(staging.glob("block-*.safetensors"))
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
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise CompressError("a model in memory needs tokenizer=..., to read the calibration text")
            model.save_pretrained(Path(scratch) / "model")
            tokenizer.save_pretrained(Path(scratch) / "model")
            model = Path(scratch) / "model"
        kept = Path(output) if output is not None else Path(scratch) / "compressed"
        run(model, recipe, kept, texts=texts, device=device)
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


def _compress_blocks(prepared: Prepared, tokens: data.Tokens, staging: Path, progress: Progress) -> list[ModuleReport]:
    model, plan, source = prepared.model, prepared.plan, prepared.source
    original_inputs = prepared.recipe.calibration.inputs == "original"
    batches = tokens.batches(max(1, _BATCH_TOKENS // tokens.ids.shape[1]))
    runner = BlockRunner(model, model.get_submodule(plan.blocks_name), batches, prepared.device)
    for buffer_owner in model.modules():
        for key, buffer in buffer_owner.named_buffers(recurse=False):
            setattr(buffer_owner, key, buffer.to(prepared.device))
    done = {index for index in [*range(plan.num_blocks), HEAD] if (staging / _block_file(index)).exists()}
    progress.start(len(plan.jobs), sum(len(plan.by_block.get(index, ())) for index in done))
    if done:
        progress.note(f"resuming: {len(done)} of {plan.num_blocks} blocks are finished")

    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    materialise(model, source, embedding, prepared.dtype, prepared.device)
    runner.embed()
    release(model, embedding)

    modules: list[ModuleReport] = []
    pending = [index for index in plan.by_block if index not in done]
    last = plan.num_blocks - 1 if HEAD in pending else max(pending, default=HEAD)  # the last block that must run
    for index in range(plan.num_blocks):
        jobs = plan.by_block.get(index, [])
        if index > last:
            modules += _read_block(staging, index)[1] if jobs else []
            continue
        prefix = f"{plan.blocks_name}.{index}."
        propagate = index < last or HEAD in pending
        materialise(model, source, prefix, prepared.dtype, prepared.device)
        linears = {job.name: model.get_submodule(job.name) for job in jobs}
        if index in done:
            packed, reports = _read_block(staging, index)
        elif jobs:
            grams = runner.grams(index, linears, keep=original_inputs and propagate)
            packed, reports = _compress_jobs(prepared, jobs, grams, progress)
        else:
            packed, reports = {}, []
        collected = original_inputs and index not in done and bool(jobs)  # then the outputs came with the statistics
        if propagate and not collected:
            if not original_inputs:
                _install(model, jobs, packed, prepared)
            runner.run(index, keep=True)
        if jobs and index not in done:
            _write_block(staging, index, packed, reports)
        modules += reports
        release(model, prefix)
        del packed
        gc.collect()
    if HEAD in plan.by_block:
        modules += _compress_head(prepared, runner, staging, HEAD in done, progress)
    return modules


def _compress_head(
    prepared: Prepared, runner: BlockRunner, staging: Path, done: bool, progress: Progress
) -> list[ModuleReport]:
    model, (job,) = prepared.model, prepared.plan.by_block[HEAD]
    if done:
        return _read_block(staging, HEAD)[1]
    for name, parameter in list(model.named_parameters()):  # the final norm, and the head itself
        if parameter.is_meta and not name.startswith(prepared.plan.blocks_name + "."):
            materialise(model, prepared.source, name, prepared.dtype, prepared.device)
    gram = Gram(job.spec["in_features"], prepared.device)
    runner.run_head(model.get_submodule(job.name), gram.add)
    packed, reports = _compress_jobs(prepared, [job], {job.name: gram}, progress)
    _write_block(staging, HEAD, packed, reports)
    return reports


def _compress_jobs(
    prepared: Prepared, jobs: list[Job], grams: dict[str, Gram], progress: Progress
) -> tuple[dict[str, Tensor], list[ModuleReport]]:
    packed: dict[str, Tensor] = {}
    reports = []
    moments: dict[int, SecondMoment] = {}
    for job in jobs:
        started = time.perf_counter()
        gram = grams[job.name]
        if id(gram) not in moments:
            moments = {id(gram): SecondMoment(gram.mean())}  # one at a time: layers that share inputs follow each other
        inputs = moments[id(gram)]
        weight = prepared.source.read(f"{job.name}.weight").to(prepared.device, torch.float32)
        try:
            tensors = methods.load(job.rule.method).compress(weight, inputs, job.spec, job.rule.options)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise CompressError(f"{job.name}: {error}") from error
        layer = _filled_layer(job, {f"{job.name}.{key}": value for key, value in tensors.items()}, prepared.device)
        error = methods.relative_output_error(weight, layer.dense_weight(), inputs.gram_II)
        report = ModuleReport.of(job.name, job.rule.method, job.spec, error, time.perf_counter() - started)
        reports.append(report)
        progress.matrix(report)
        packed.update({f"{job.name}.{key}": value.cpu() for key, value in tensors.items()})
    return packed, reports


def _filled_layer(job: Job, packed: dict[str, Tensor], device: torch.device) -> nn.Module:
    layer = build({**job.spec, "bias": False}).to(device)
    state = {key: packed[f"{job.name}.{key}"] for key in layer.state_dict()}
    layer.load_state_dict(state)
    return layer


def _install(model: nn.Module, jobs: list[Job], packed: dict[str, Tensor], prepared: Prepared) -> None:
    """Give the linears the weights that their packed tensors stand for: for thousands of tokens at once the multiplied-out
    product is the fastest way to run a compressed layer, and it is the same function."""
    for job in jobs:
        weight = _filled_layer(job, packed, prepared.device).dense_weight()
        model.get_submodule(job.name).weight = nn.Parameter(weight.to(prepared.dtype), requires_grad=False)


def _block_file(index: int) -> str:
    return "block-head.safetensors" if index == HEAD else f"block-{index:05d}.safetensors"


def _write_block(staging: Path, index: int, packed: dict[str, Tensor], reports: list[ModuleReport]) -> None:
    """The tensors are renamed into place last: their file alone says that the block is finished."""
    file = staging / _block_file(index)
    write_whole(file.with_suffix(".json"), [json.dumps([report.to_dict() for report in reports]).encode()])
    write_file(file, packed)


def _read_block(staging: Path, index: int) -> tuple[dict[str, Tensor], list[ModuleReport]]:
    file = staging / _block_file(index)
    reports = [ModuleReport(**entry) for entry in json.loads(file.with_suffix(".json").read_text())]
    return {name: tensor.read() for name, tensor in read_header(file).items()}, reports


def _open_staging(staging: Path, identity: dict[str, str]) -> None:
    state = staging / "run.json"
    if state.is_file():
        before = json.loads(state.read_text())
        changed = [key for key in identity if before.get(key) != identity[key]]
        if changed:
            raise CompressError(
                f"{staging} holds an unfinished run with another {' and '.join(changed)}; "
                "repeat that command to finish it, or remove the directory"
            )
    else:
        shutil.rmtree(staging, ignore_errors=True)  # killed before it had begun
        staging.mkdir()
        write_whole(state, [json.dumps(identity, indent=1).encode()])


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
