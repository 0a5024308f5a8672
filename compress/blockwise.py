"""The work itself, block by block: gather statistics, compress, hand the compressed block's outputs to the next one.

Finished blocks of a run that was cut off are replayed on the calibration inputs, which gives the same hidden states, and
the rest follows with the same bytes. Memory: one block, its statistics, and the hidden states of the calibration tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from compress import methods
from compress.calibrate import data
from compress.calibrate.blocks import BlockRunner, View
from compress.calibrate.statistics import Gram, SeenGram
from compress.errors import CompressError
from compress.layers import CompressedLinear, Spec, build, layer_class
from compress.linalg import SecondMoment
from compress.lineage import Lineage
from compress.memory import give_back_freed_memory
from compress.model import materialise, materialise_head, release
from compress.plan import HEAD, Job
from compress.prepare import Prepared
from compress.refine import refine_block
from compress.report import ModuleReport
from compress.staging import finished_blocks, read_block, write_block

_BATCH_TOKENS = 4096  # tokens fed at once: enough to keep matrix products busy, little enough to be no burden


class Progress(Protocol):
    """What a run tells whoever watches; every method may do nothing. `count` begins a stage of so many steps and returns
    what is called after each."""

    def note(self, text: str) -> None: ...
    def count(self, total: int, what: str) -> Callable[[], None]: ...
    def start(self, matrices: int, done: int) -> None: ...
    def matrix(self, module: ModuleReport) -> None: ...


class Silent:
    """A progress that shows nothing."""

    def note(self, text: str) -> None:
        pass

    def count(self, total: int, what: str) -> Callable[[], None]:
        return lambda: None

    def start(self, matrices: int, done: int) -> None:
        pass

    def matrix(self, module: ModuleReport) -> None:
        pass


def start_runner(prepared: Prepared, tokens: data.Tokens, batch_tokens: int = _BATCH_TOKENS) -> BlockRunner:
    """A runner that holds the first block's inputs. What lies around the blocks (position tables, norms) keeps its weights,
    because the model runs it again with every block; only the embedding, the one large part of it, is dropped."""
    model = prepared.model
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(prepared.device))
    batches = tokens.batches(max(1, batch_tokens // tokens.ids.shape[1]))
    runner = BlockRunner(model, model.get_submodule(prepared.plan.blocks_name), batches, prepared.device)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    around = prepared.plan.blocks_name.rpartition(".")[0]
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and name.startswith(around) and not name.startswith(f"{prepared.plan.blocks_name}."):
            materialise(model, prepared.source, name, prepared.dtype, prepared.device)
    runner.embed()
    release(model, embedding + ".")
    return runner


def compress_blocks(
    prepared: Prepared, tokens: data.Tokens, staging: Path, lineage: Lineage, progress: Progress
) -> list[ModuleReport]:
    """Do what is left of the plan; the packed tensors go to `staging`, the figures of all matrices are returned."""
    model, plan, source = prepared.model, prepared.plan, prepared.source
    original_inputs = prepared.recipe.calibration.inputs == "original"
    done = finished_blocks(staging, plan)
    progress.start(len(plan.jobs), sum(len(plan.by_block.get(index, ())) for index in done))
    if done:
        progress.note(f"resuming: {len(done)} of {plan.num_blocks} blocks are finished")

    runner = start_runner(prepared, tokens)
    if prepared.recipe.calibration.inputs == "paired":
        runner.pair(prepared.recipe.calibration.paired_share)
    modules: list[ModuleReport] = []
    pending = [index for index in plan.by_block if index not in done]
    last = plan.num_blocks - 1 if HEAD in pending else max(pending, default=HEAD)  # the last block that must run
    for index in range(plan.num_blocks):
        jobs = plan.by_block.get(index, [])
        if index > last:
            modules += read_block(staging, index)[1] if jobs else []
            continue
        prefix = f"{plan.blocks_name}.{index}."
        propagate = index < last or HEAD in pending
        gathers = index not in done and bool(jobs)
        materialise(model, source, prefix, prepared.dtype, prepared.device)
        linears = {job.name: model.get_submodule(job.name) for job in jobs}
        if index in done:
            packed, reports = read_block(staging, index)
        elif gathers:
            weights = {name: prepared.token_weights[name].read() for name in linears if name in prepared.token_weights}
            keep = original_inputs and propagate
            grams = runner.grams(index, linears, keep=keep, views=_views(jobs), weights=weights)
            packed, reports = _compress_jobs(prepared, jobs, grams, progress)
            if prepared.recipe.refine.epochs:
                packed, reports = _refined(prepared, runner, index, packed, reports, grams, progress)
        else:
            packed, reports = {}, []
        if propagate and not gathers:
            runner.run_reference(index)
        if propagate and not (original_inputs and gathers):  # else the outputs came with the statistics
            with nullcontext() if original_inputs else _installed(model, jobs, packed, prepared):
                runner.run(index, keep=True)
        if jobs and index not in done:
            write_block(staging, index, lineage.of(index), packed, reports)
        modules += reports
        release(model, prefix)
        del packed
        give_back_freed_memory()
    if HEAD in plan.by_block:
        modules += _compress_head(prepared, runner, staging, lineage, HEAD in done, progress)
    return modules


def _compress_head(
    prepared: Prepared, runner: BlockRunner, staging: Path, lineage: Lineage, done: bool, progress: Progress
) -> list[ModuleReport]:
    model, (job,) = prepared.model, prepared.plan.by_block[HEAD]
    if done:
        return read_block(staging, HEAD)[1]
    materialise_head(model, prepared.source, prepared.plan.blocks_name, prepared.dtype, prepared.device)
    _, seen = _views([job]).get(job.name, (None, None))
    gram = (SeenGram if seen else Gram)(job.spec["in_features"], prepared.device)
    runner.run_head(model.get_submodule(job.name), (lambda x, mask: gram.add(x, seen(x), mask)) if seen else gram.add)
    packed, reports = _compress_jobs(prepared, [job], {job.name: gram}, progress)
    write_block(staging, HEAD, lineage.of(HEAD), packed, reports)
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
            moments = {id(gram): second_moment(gram)}  # one at a time: layers that share inputs follow each other
        inputs = moments[id(gram)]
        if inputs.unseen:
            progress.note(f"{job.name} saw only zeros on the calibration text: its error is that of its weight alone")
        weight = prepared.source.read(f"{job.name}.weight").to(prepared.device, torch.float32)
        try:
            method, wanted = methods.load(job.rule.method), inputs.fitted(weight)
            weighted = inputs.for_outputs(prepared.sensitivity.get(job.name))
            tensors = method.compress(wanted, weighted, job.spec, job.rule.options)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise CompressError(f"{job.name}: {error}") from error
        _require_finite(job.name, tensors)
        layer = filled_layer(job.spec, tensors, prepared.device)
        error = inputs.relative_error(weight, layer.dense_weight())
        _require_finite(job.name, {"error": torch.tensor(error)})
        report = ModuleReport.of(job.name, job.rule.method, job.spec, error, time.perf_counter() - started)
        reports.append(report)
        progress.matrix(report)
        packed.update({f"{job.name}.{key}": value.cpu() for key, value in tensors.items()})
    return packed, reports


def _refined(
    prepared: Prepared,
    runner: BlockRunner,
    index: int,
    packed: dict[str, Tensor],
    reports: list[ModuleReport],
    grams: dict[str, Gram | SeenGram],
    progress: Progress,
) -> tuple[dict[str, Tensor], list[ModuleReport]]:
    """The packed tensors of a block fitted together, and what that did to the error of each matrix by itself."""
    layers = {r.name: filled_layer(r.spec, _tensors_of(r.name, packed), prepared.device) for r in reports}
    seed = prepared.recipe.calibration.seed + index
    counts = prepared.token_weights.get(f"{prepared.plan.blocks_name}.{index}")
    weights = None if counts is None else counts.read()
    found = refine_block(runner, index, layers, prepared.recipe.refine, seed, weights)
    outcome = "refined" if found.better else "kept, for refining gave"
    progress.note(f"block {index}: error of its output {found.before:.4f}, {outcome} {found.after:.4f}")
    if not found.better:
        return packed, reports
    packed, after = {}, []
    for report in reports:
        layer = layers[report.name]
        weight = prepared.source.read(f"{report.name}.weight").to(prepared.device, torch.float32)
        error = second_moment(grams[report.name]).relative_error(weight, layer.dense_weight())
        after.append(replace(report, error=error))
        packed.update({f"{report.name}.{key}": value.cpu() for key, value in layer.state_dict().items()})
    return packed, after


def _tensors_of(name: str, packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packed tensors of one layer, by their own names."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in packed.items() if key.startswith(prefix)}


def _views(jobs: list[Job]) -> dict[str, View]:
    """How the jobs that want to know it will round their inputs; their specs alone decide."""
    views = {}
    for job in jobs:
        cls = layer_class(job.spec["format"])
        key = cls.rounding(job.spec)
        if key and getattr(job.rule.options, "rounded_inputs", False):
            views[job.name] = (key, partial(cls.seen_input, job.spec))
    return views


def second_moment(gram: Gram | SeenGram) -> SecondMoment:
    """The moments of a layer's inputs; where all were zero any approximation is exact, and the identity asks for that of the
    weight alone."""
    mean = (gram.seen if isinstance(gram, SeenGram) else gram).mean()
    if not mean.any():
        return SecondMoment(torch.eye(len(mean), dtype=mean.dtype, device=mean.device), unseen=True)
    if isinstance(gram, Gram):
        return SecondMoment(mean)
    return SecondMoment(mean, gram.target.mean(), gram.cross_II / gram.seen.tokens)


def _require_finite(name: str, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CompressError(
                f"{name}: compressing it gave a NaN or infinite {key}; raise weights.damping, or leave it out with a rule "
                "`method: none`"
            )


def filled_layer(spec: Spec, tensors: dict[str, Tensor], device: torch.device) -> CompressedLinear:
    """The layer of a spec, its bias left out, with its packed tensors."""
    layer = build({**spec, "bias": False}).to(device)
    layer.load_state_dict(tensors)
    return layer


@contextmanager
def _installed(model: nn.Module, jobs: list[Job], packed: dict[str, Tensor], prepared: Prepared) -> Iterator[None]:
    """Let the linears compute what their packed tensors stand for: for thousands of tokens at once the multiplied-out
    product, behind the rounding of the inputs if there is any, is the fastest way to run the same function."""
    handles = []
    for job in jobs:
        layer, linear = filled_layer(job.spec, _tensors_of(job.name, packed), prepared.device), model.get_submodule(job.name)
        linear.weight = nn.Parameter(layer.dense_weight().to(prepared.dtype), requires_grad=False)
        if layer.rounding(job.spec):
            handles.append(linear.register_forward_pre_hook(partial(_round_inputs, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round_inputs(layer: CompressedLinear, module: nn.Module, args: tuple) -> tuple:
    return (layer.seen_input(layer.spec, args[0]), *args[1:])
