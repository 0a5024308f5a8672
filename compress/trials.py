"""Trials: what every way to store a matrix would cost, and what the model's output minds, found before the real run.

Every matrix is compressed in the ways its rule leaves open (`kinds` and `alternatives` of its method), on statistics of the
original model, rotated where a rule rotates it, and each is priced by what it does to the output. For rules with
`allocation: search` an error counts by the sensitivity of the output neuron and of the tokens it falls on
(`compress.calibrate.sensitivity`), in nats of KL per token:

    1/2 sum over output neurons n of f_n (w_n - what_n) E[s x x^T] / E[s] (w_n - what_n)^T

Without search f is one: alternatives of one matrix are compared by its output error at equal bytes.

Two things keep trials short. A form of dictionary that was the best for none of the first few matrices of a name is not
tried on the others of that name. And where every neuron is solved for itself (unit vectors), the sizes of a form are tried
on one of every few neurons, in the order of their sensitivities; forms are compared on all, because one neuron may count
as much as a hundred others.

Cost: one pass of the block loop, a backward one where gradients are needed (`compress.passes`), and the trials, most of it.
What was tried of a block is kept: a run that was cut off repeats the passes alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compress import methods
from compress.blockwise import Progress, filled_layer, second_moment, start_runner
from compress.calibrate import data
from compress.calibrate.sensitivity import Sensitivity, of_block, through_block
from compress.calibrate.statistics import Gram
from compress.errors import CompressError
from compress.forms import Forms, kinds_of, one_of, own_size, sizes_of, spec_of
from compress.jsonfile import read_json, write_json
from compress.layers import Spec, packed_bytes
from compress.linalg import SecondMoment, relative
from compress.memory import give_back_freed_memory
from compress.passes import BATCH_TOKENS, STATES, Passes, backwards, forwards
from compress.plan import Job, minds
from compress.prepare import Prepared, skeleton_of
from compress.staging import TRIED

_FLATTERED = 1.05  # a trial makes other forms than the first look up to 3 % better beside it than they are; ties go to it


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix: the options that differ from its rule and its ratio in any case, bytes, relative output
    error and price."""

    options: dict[str, Any]
    bytes: int
    error: float
    price: float


@dataclass(frozen=True)
class Trials:
    """Candidates of every open matrix; and of every matrix that was watched on the way back, by name, the sensitivities of
    its outputs and how many times each token counts in what it is fitted to; of a block that is refined, too."""

    candidates: dict[str, list[Candidate]]
    outputs: dict[str, Tensor]
    tokens: dict[str, Tensor]


def run_trials(prepared: Prepared, jobs: list[Job], tokens: data.Tokens, staging: Path, progress: Progress) -> Trials:
    """Candidates of the open `jobs`, and what the output minds where any rule or the calibration asks for that."""
    model = skeleton_of(prepared)  # of its own: it is left with weights in it
    prepared = replace(prepared, model=model)
    passes = Passes(prepared, jobs, tokens.count)
    tokens = tokens if passes.share else tokens.first(passes.tokens)
    trials = Trials({}, {}, {})
    if jobs:
        what = "searching for" if passes.searched else "trying"
        progress.note(f"{what} the best form of {len(jobs)} matrices on {tokens.count} tokens")
        advance = progress.count(len(jobs), "matrices tried")
    if passes.share:
        progress.note(f"gradients of {tokens.count} tokens through {prepared.plan.num_blocks} blocks, to weigh the tokens")
    runner = start_runner(prepared, tokens, batch_tokens=BATCH_TOKENS)
    forms, fitting, judging = Forms(), 1.0, None
    if passes.share and len(runner.batches) > 1:
        # the few tokens that count most may be answered to the letter: what that is worth, others have to tell
        judging = range(1, len(runner.batches), 2)
        fitted = torch.cat([torch.full((len(ids), 1), n not in judging) for n, (ids, _) in enumerate(runner.batches)])
        fitting = fitted / fitted.float().mean()
    if done := len(list(staging.glob(TRIED))):
        progress.note(f"resuming: the matrices of {done} of {prepared.plan.num_blocks} blocks are tried")
    walk = backwards(prepared, runner, passes, staging / STATES) if passes.watched else forwards(prepared, runner)
    for index, gradients in walk:
        here = [job for job in jobs if job.block == index]
        file = staging / TRIED.replace("*", f"{index:05d}")
        minded: dict[str, Sensitivity] = {}
        counts: dict[str, Tensor | None] = {}
        if passes.share and prepared.recipe.refine.epochs and index in prepared.plan.by_block:
            counts[f"{prepared.plan.blocks_name}.{index}"] = of_block(gradients, [mask for _, mask in runner.batches])
        if gradients is not None:
            watched = {job.name: model.get_submodule(job.name) for job in passes.watched if job.block == index}
            minded = through_block(runner, index, gradients, watched, passes.priced & watched.keys(), judging)
            trials.outputs.update({name: one.outputs_N for name, one in minded.items() if name in passes.priced})
        if passes.share:
            counts |= {name: one.tokens_BL for name, one in minded.items()}
            weighed = {name: count for name, count in counts.items() if count is not None}
            trials.tokens.update({name: 1 - passes.share + passes.share * count for name, count in weighed.items()})
        found = _kept(file, here)
        for job in here if found else ():
            forms.note(job, found[job.name][0])
            advance()
        if here and not found:
            weights = {job.name: trials.tokens[job.name] * fitting for job in here if job.name in trials.tokens}
            linears = {job.name: model.get_submodule(job.name) for job in here}
            grams = runner.grams(index, linears, keep=False, weights=weights)
            found = _try_block(prepared, here, grams, trials.outputs, minded, forms, advance)
            record = {name: {"form": form, "candidates": [asdict(c) for c in of]} for name, (form, of) in found.items()}
            write_json(file, record)
        trials.candidates.update({name: candidates for name, (_, candidates) in found.items()})
        give_back_freed_memory()
    return trials


def _kept(file: Path, jobs: list[Job]) -> dict[str, tuple[int, list[Candidate]]]:
    """Form and candidates of a block's matrices, as a run that was cut off has left them; nothing where it did not come to
    them, or the file is damaged."""
    if not file.exists():
        return {}
    with suppress(CompressError, KeyError, TypeError, AttributeError):
        record = read_json(file)
        return {
            job.name: (record[job.name]["form"], [Candidate(**one) for one in record[job.name]["candidates"]])
            for job in jobs
        }
    return {}


def _try_block(
    prepared: Prepared,
    jobs: list[Job],
    grams: dict[str, Gram],
    outputs: dict[str, Tensor],
    minded: dict[str, Sensitivity],
    forms: Forms,
    advance: Callable[[], None],
) -> dict[str, tuple[int, list[Candidate]]]:
    """Form and candidates of a block's matrices, fitted to `grams` and priced by the sensitivities of their `outputs` and,
    where there are any, by the moments of what is `minded`."""
    moments: dict[int, SecondMoment] = {}
    found = {}
    for job in jobs:
        moments.setdefault(id(grams[job.name]), second_moment(grams[job.name]))
        inputs = judge = moments[id(grams[job.name])].for_outputs(outputs.get(job.name))
        if job.name in minded and minded[job.name].inputs_II is not None:
            judge = SecondMoment(minded[job.name].inputs_II)
        found[job.name] = _tried(prepared, job, inputs, judge, forms)
        forms.note(job, found[job.name][0])
        advance()
    return found


def _tried(
    prepared: Prepared, job: Job, inputs: SecondMoment, judge: SecondMoment, forms: Forms
) -> tuple[int, list[Candidate]]:
    """What the alternatives of a matrix, fitted to its inputs, cost by the moments of a judge: which form is the best at the
    size it would have by itself, and all sizes of it."""
    method, whole = methods.load(job.rule.method), job.rule.options
    weight = prepared.source.read(f"{job.name}.weight").to(prepared.device, torch.float32)
    before = whole.model_dump()
    found: dict[str, Candidate] = {}

    def trial(options: methods.MethodConfig, kind: int, every: int) -> Candidate | None:
        """The price of one alternative of a kind by one of `every` neurons; None when it does not fit the matrix."""
        spec = spec_of(prepared.model, prepared.source, job, options)
        if spec is None:
            return None
        key = json.dumps(spec, sort_keys=True)
        if key not in found:
            try:
                error, price = _priced(method, options, weight, inputs, judge, spec, every)
            except (ValueError, torch.linalg.LinAlgError) as failure:
                raise CompressError(f"{job.name}: {failure}") from failure
            # a size is stated in any case: it holds for another rule, too (`compress.earlier`)
            changed = {
                name: value for name, value in options.model_dump().items() if value != before[name] or name == "ratio"
            }
            found[key] = Candidate(changed, packed_bytes(spec), error, price * (_FLATTERED if kind else 1))
        return found[key]

    kinds = kinds_of(job)
    worth_it = forms.worth_it(job, len(kinds))
    best = worth_it[0]
    if len(worth_it) > 1:
        own = {index: [trial(form, index, 1) for form in own_size(job, kinds[index])] for index in worth_it}
        prices = {index: min(one.price for one in tried if one) for index, tried in own.items() if any(tried)}
        best = min(prices, key=prices.__getitem__, default=best)
    if minds(job, "allocation", "search"):
        found.clear()  # the other forms lost
    for options in sizes_of(job, kinds[best]):
        trial(options, best, one_of(method, options, len(weight)))
    if not found:
        raise CompressError(f"{job.name}: nothing fits its budget; lower the ratio, or leave it out with `method: none`")
    return best, list(found.values())


def _priced(
    method: ModuleType,
    options: methods.MethodConfig,
    weight: Tensor,
    inputs: SecondMoment,
    judge: SecondMoment,
    spec: Spec,
    every: int,
) -> tuple[float, float]:
    """Relative output error and price of one way to store a matrix, from one of `every` neurons."""
    importance, share = inputs.importance_N, 1.0
    if every > 1:
        rows, share = _sample(importance, len(weight), every)
        importance = None if importance is None else importance[rows.to(importance.device)]
        weight, inputs = weight[rows.to(weight.device)], inputs.for_outputs(importance)
        spec = spec | {"out_features": len(rows)}
    quick = method.quick(options) if hasattr(method, "quick") else options
    tensors = method.compress(weight, inputs, spec, quick)
    approximation = filled_layer(spec, tensors, weight.device).dense_weight()
    errors, judged = inputs.errors(weight, approximation), judge.errors(weight, approximation)
    price = float(judged.sum() if importance is None else judged @ importance.to(judged.device) / 2)
    return relative(errors, inputs.energy(weight)), share * price


def _sample(importance_N: Tensor | None, neurons: int, every: int) -> tuple[Tensor, float]:
    """One of every few neurons, the largest of its like, and how many times their price is that of all; at random where
    they count alike, because heads are laid out regularly."""
    if importance_N is None or not importance_N.any():
        rows = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))[::every]
        return rows, neurons / len(rows)
    rows = importance_N.argsort(descending=True, stable=True).cpu()[::every]
    return rows, float(importance_N.sum() / importance_N[rows.to(importance_N.device)].sum())
