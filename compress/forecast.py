"""The dry run: what a run will do, store and need, from shapes alone."""

from __future__ import annotations

import time

import torch
from rich.table import Table

from compress import methods
from compress.calibrate.sensitivity import tokens_at_once
from compress.forms import Forms, is_open, kinds_of, one_of, open_jobs, own_size, sizes_of, spec_of
from compress.layers import dense_bytes
from compress.passes import BATCH_TOKENS, Passes
from compress.plan import HEAD, Job, Plan, added_bytes, block_of, minds, planned_bytes
from compress.prepare import Prepared
from compress.report import duration, megabytes, sizes


def predicted_memory_bytes(prepared: Prepared, *, trials: bool = True) -> int:
    """Largest block in the compute dtype, hidden states, the largest matrix's fp64 working set, and 700 MB of libraries; or,
    if that is more, the head and logits on their way back."""
    options, plan = prepared.recipe.calibration, prepared.plan
    config = prepared.model.config.get_text_config(decoder=True)
    width, item = config.hidden_size, prepared.dtype.itemsize
    block = max(prepared.block_parameters()) * item
    around = [
        tensor.num_bytes // tensor.dtype.itemsize * item
        for name, tensor in prepared.source.tensors.items()
        if block_of(name, plan.blocks_name) == HEAD
    ]
    logits = logits_bytes(prepared) if trials else 0
    outside = sum(around) + logits if logits else max(around)
    hidden = 2 * options.samples * options.length * width * item
    solving = max(
        8 * (6 * j.spec["in_features"] ** 2 + 4 * j.spec["in_features"] * j.spec["out_features"]) for j in plan.jobs
    )
    if prepared.recipe.refine.epochs:
        solving = max(solving, 24 * block // item)  # weights, masters, gradients and Adam's moments in fp32
        hidden *= 2
    return max(block + solving, outside) + hidden + (700 << 20)


def predicted_seconds(prepared: Prepared, *, trials: bool = True) -> float:
    """Forward passes, Gram matrices, solvers and trials as flops over the speed of one matrix product, measured now."""
    options, plan = prepared.recipe.calibration, prepared.plan
    tokens = options.samples * options.length
    last = max(plan.num_blocks - 1 if job.block == HEAD else job.block for job in plan.jobs)
    through = sum(prepared.block_parameters(active=True)[: last + 1])
    passes = 1 if options.inputs == "original" else 2
    if prepared.recipe.refine.epochs:
        passes += 3 * (1 + prepared.recipe.refine.epochs)
    widths = {(job.block, job.spec["in_features"]) for job in plan.jobs}
    calibration = 2 * tokens * through * passes + 1.2 * tokens * sum(width**2 for _, width in widths)
    solving = sum(
        methods.load(job.rule.method).flops(job.spec["in_features"], job.spec["out_features"], job.spec, job.rule.options)
        for job in plan.jobs
    )
    before = trial_flops(prepared) if trials else 0.0
    return (calibration + solving + before) / _flops_per_second(prepared.device)


def _foreseen(prepared: Prepared) -> Passes:
    """What a run will need, if its text gives all the tokens that the recipe asks for."""
    options = prepared.recipe.calibration
    return Passes(prepared, open_jobs(prepared.plan), options.samples * options.length)


def trial_flops(prepared: Prepared) -> float:
    """Operations of what happens before the run: passes for sensitivities, and trials where something is open."""
    jobs, passes = open_jobs(prepared.plan), _foreseen(prepared)
    if not passes.needed:
        return 0.0
    counts = prepared.block_parameters(active=True)
    through, back = sum(counts), sum(counts[passes.first_block :])
    config = prepared.model.config.get_text_config(decoder=True)
    # once for hidden states, once more for the Gram matrices of trials, and there and back
    total = 2.0 * passes.tokens * (through + (back if jobs else 0)) + 6.0 * back * passes.backward_tokens
    total += 6.0 * config.hidden_size * config.vocab_size * passes.backward_tokens
    # moments that count tokens by their gradients, of every matrix that they price
    total += 1.2 * passes.backward_tokens * sum(job.spec["in_features"] ** 2 for job in jobs if job.name in passes.priced)
    forms = Forms()
    for job in filter(is_open, jobs):
        method, kinds = methods.load(job.rule.method), kinds_of(job)
        kept = [kinds[index] for index in forms.worth_it(job, len(kinds))]
        forms.note(job, 0)
        inputs, outputs = job.spec["in_features"], job.spec["out_features"]
        compared = {form for kind in kept for form in own_size(job, kind)} if len(kept) > 1 else set()
        for tried in compared | {*sizes_of(job, kept[0])}:
            quick = method.quick(tried) if hasattr(method, "quick") else tried
            neurons = outputs // (1 if tried in compared else one_of(method, tried, outputs))
            spec = spec_of(prepared.model, prepared.source, job, tried)
            total += method.flops(inputs, neurons, spec, quick) if spec else 0
    return total


def states_bytes(prepared: Prepared) -> int:
    """Bytes on disk of the hidden states that the way back needs, at most."""
    options, plan = prepared.recipe.calibration, prepared.plan
    places, passes = options.samples * options.length, _foreseen(prepared)
    if not passes.watched:
        return 0
    width = prepared.model.config.get_text_config(decoder=True).hidden_size
    stored = passes.tokens if options.layout == "stream" else places  # padding has states, too
    return stored * width * prepared.dtype.itemsize * (plan.num_blocks - passes.first_block)


def logits_bytes(prepared: Prepared) -> int:
    """Bytes in memory of the logits on the way back: as they come, in fp32, their distribution, their gradient."""
    if not _foreseen(prepared).watched:
        return 0
    vocabulary = prepared.model.config.get_text_config(decoder=True).vocab_size
    tokens = max(BATCH_TOKENS, prepared.recipe.calibration.length)
    return 4 * 4 * min(tokens, tokens_at_once(prepared.model)) * vocabulary


def _flops_per_second(device: torch.device) -> float:
    x = torch.randn(1024, 1024, device=device)
    x @ x
    start = time.perf_counter()
    for _ in range(8):
        x = torch.tanh(x @ x)
    x.sum().item()  # waits for a GPU
    return 8 * 2 * 1024**3 / (time.perf_counter() - start)


def _roughly(value: float) -> float:
    """Two digits: a forecast knows no more."""
    return float(f"{value:.1e}")


def size_notes(plan: Plan) -> list[str]:
    """One line per distinct shape and format: what the matrices of that shape become."""
    groups: dict[tuple, list[Job]] = {}
    for job in plan.jobs:
        groups.setdefault(tuple(sorted((key, str(value)) for key, value in job.spec.items() if key != "bias")), []).append(
            job
        )
    notes = []
    for jobs in groups.values():
        spec, leaves = jobs[0].spec, ", ".join(dict.fromkeys(job.name.rpartition(".")[2] for job in jobs))
        shape = f"{spec['in_features']} -> {spec['out_features']}"
        notes.append(f"{len(jobs)} x {shape} ({leaves}): {spec['format']}, {sizes(spec)}")
    return notes


def forecast_table(prepared: Prepared, *, trials: bool = True) -> Table:
    """One row per distinct shape, then the totals, the time with trials or, where an earlier run has made them, without."""
    plan = prepared.plan
    table = Table("modules", "shape", "format", "sizes", "bytes before", "bytes after", title="plan; nothing was written")
    groups: dict[tuple, list] = {}
    for job in plan.jobs:
        groups.setdefault((job.name.rpartition(".")[2], *sorted((k, str(v)) for k, v in job.spec.items())), []).append(job)
    for (leaf, *_), jobs in groups.items():
        spec = jobs[0].spec
        table.add_row(
            f"{len(jobs)} x {leaf}",
            f"{spec['in_features']} -> {spec['out_features']}",
            spec["format"],
            "found by the search" if minds(jobs[0], "allocation", "search") else sizes(spec),
            megabytes(sum(dense_bytes(job.spec) for job in jobs)),
            megabytes(sum(planned_bytes(job) for job in jobs)),
        )
    packed = sum(map(planned_bytes, plan.jobs))
    fewer = f"{100 * (1 - packed / plan.dense_bytes):.1f} % fewer"
    table.add_section()
    table.add_row("total", "", "", fewer, megabytes(plan.dense_bytes), megabytes(packed))
    whole, added = prepared.source.stored_bytes, added_bytes(prepared.model, prepared.recipe)
    table.add_row(
        "whole checkpoint", "", "", "", megabytes(whole), megabytes(whole - prepared.replaced_bytes + packed + added)
    )
    memory = _roughly(predicted_memory_bytes(prepared, trials=trials))
    table.add_row("memory, about", "", "", "", "", f"{memory / 1e6:,.0f} MB")
    minutes = _roughly(predicted_seconds(prepared, trials=trials) / 60)
    table.add_row("time here, about", "", "", "", "", duration(60 * minutes))
    for note in plan.notes:
        table.add_row(note)
    return table
