"""Trials: what every way to store a matrix would cost, and what the model's output minds, found before the real run.

Every matrix is compressed in the ways its rule leaves open (`kinds` and `alternatives` of its method), on statistics of the
original model, and each is priced by what it does to the output. For rules with `allocation: search` an error counts by the
sensitivity of the output neuron and of the tokens it falls on (`compress.calibrate.sensitivity`), in nats of KL per token:

    1/2 sum over output neurons n of f_n (w_n - what_n) E[s x x^T] / E[s] (w_n - what_n)^T

Without search f is one: alternatives of one matrix are compared by its output error at equal bytes.

Two things keep trials short. Where every neuron is solved for itself (unit vectors), one of every few neurons is tried, in
the order of their sensitivities. And a form of dictionary that was the best for none of the first `_ENOUGH` matrices of a
name is not tried on the others of that name.

Cost: one pass of the block loop, a backward one where gradients are needed (`compress.passes`), and the trials.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compress import methods
from compress.blockwise import Progress, filled_layer, second_moment, start_runner
from compress.calibrate import data
from compress.calibrate.sensitivity import Sensitivity, of_block, through_block
from compress.errors import CompressError
from compress.layers import Spec, packed_bytes
from compress.linalg import SecondMoment, relative
from compress.memory import give_back_freed_memory
from compress.model import build_skeleton
from compress.passes import STATES, Passes, backwards, forwards, minds
from compress.plan import HEAD, Job, Plan, job_spec
from compress.prepare import Prepared

_NEURONS = 256  # of a matrix, at least, where they are tried one by one
_ENOUGH = 4  # matrices of one name in which a form never was the best
_BATCH_TOKENS = 1024  # the logits of a batch and their gradients are held at once


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


def open_jobs(plan: Plan) -> list[Job]:
    """The jobs with more than one candidate, and those that ask for sensitivities."""
    return [job for job in plan.jobs if _is_open(job) or minds(job, "weighting", "fisher")]


def _is_open(job: Job) -> bool:
    method, options = methods.load(job.rule.method), job.rule.options
    site = methods.Site(job.spec["in_features"], job.spec["out_features"])
    return job.block != HEAD and len(_kinds(method, site, options)) * len(_alternatives(method, site, options)) > 1


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
    forms = _Forms()
    for job in filter(_is_open, jobs):
        method, whole = methods.load(job.rule.method), job.rule.options
        site = methods.Site(job.spec["in_features"], job.spec["out_features"])
        kinds = _kinds(method, site, whole)
        kept = [kinds[index] for index in forms.worth_it(job, len(kinds))]
        forms.note(job, 0)
        for tried in {*kept, *_alternatives(method, site, kept[0])}:
            quick = method.quick(tried) if hasattr(method, "quick") else tried
            neurons = site.out_features // _one_of(method, tried, site.out_features)
            with suppress(CompressError):  # what does not fit is not tried
                spec = job_spec(prepared.model, job.name, prepared.source, job.rule.model_copy(update={"options": tried}))
                total += method.flops(site.in_features, neurons, spec, quick)
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
    """Bytes in memory of a batch's logits on the way back: as they come, in fp32, their distribution, their gradient."""
    if not _foreseen(prepared).watched:
        return 0
    vocabulary = prepared.model.config.get_text_config(decoder=True).vocab_size
    return 4 * 4 * max(_BATCH_TOKENS, prepared.recipe.calibration.length) * vocabulary


def _one_of(method: ModuleType, options: methods.MethodConfig, neurons: int) -> int:
    """One of how many neurons is tried."""
    alone = hasattr(method, "solves_neurons_alone") and method.solves_neurons_alone(options)
    return max(1, neurons // _NEURONS) if alone else 1


def _kinds(method: ModuleType, site: methods.Site, options: methods.MethodConfig) -> list[methods.MethodConfig]:
    return method.kinds(site, options) if hasattr(method, "kinds") else [options]


def _alternatives(method: ModuleType, site: methods.Site, options: methods.MethodConfig) -> list[methods.MethodConfig]:
    return method.alternatives(site, options) if hasattr(method, "alternatives") else [options]


def run_trials(prepared: Prepared, jobs: list[Job], tokens: data.Tokens, staging: Path, progress: Progress) -> Trials:
    """Candidates of the open `jobs`, and what the output minds where any rule or the calibration asks for that."""
    model = build_skeleton(prepared.source.path)  # of its own: it is left with weights in it
    prepared = replace(prepared, model=model)
    passes = Passes(prepared, jobs, tokens.count)
    tokens = tokens if passes.share else tokens.first(passes.tokens)
    trials = Trials({}, {}, {})
    if jobs:
        what = "searching for" if passes.searched else "trying"
        progress.note(f"{what} the best form of {len(jobs)} matrices on {tokens.count} tokens")
    if passes.share:
        progress.note(f"gradients of {tokens.count} tokens through {prepared.plan.num_blocks} blocks, to weigh the tokens")
    runner = start_runner(prepared, tokens, batch_tokens=_BATCH_TOKENS)
    forms, fitting, judging = _Forms(), 1.0, None
    if passes.share and len(runner.batches) > 1:
        # the few tokens that count most may be answered to the letter: what that is worth, others have to tell
        judging = range(1, len(runner.batches), 2)
        fitted = torch.cat([torch.full((len(ids), 1), n not in judging) for n, (ids, _) in enumerate(runner.batches)])
        fitting = fitted / fitted.float().mean()
    walk = backwards(prepared, runner, passes, staging / STATES) if passes.watched else forwards(prepared, runner)
    for index, gradients in walk:
        here = [job for job in jobs if job.block == index]
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
        if here:
            linears = {job.name: model.get_submodule(job.name) for job in here}
            weights = {name: trials.tokens[name] * fitting for name in linears if name in trials.tokens}
            grams = runner.grams(index, linears, keep=False, weights=weights)
        moments: dict[int, SecondMoment] = {}
        for job in here:
            moments.setdefault(id(grams[job.name]), second_moment(grams[job.name]))
            inputs = judge = moments[id(grams[job.name])].for_outputs(trials.outputs.get(job.name))
            if job.name in minded and minded[job.name].inputs_II is not None:
                judge = SecondMoment(minded[job.name].inputs_II)
            trials.candidates[job.name] = _tried(prepared, job, inputs, judge, forms)
        done = len(trials.candidates)
        if here and done * 5 // len(jobs) > (done - len(here)) * 5 // len(jobs):
            progress.note(f"tried {done} of {len(jobs)} matrices")
        give_back_freed_memory()
    return trials


class _Forms:
    """The kinds of dictionary that are still worth a trial, by the matrix's name, sizes and rule."""

    def __init__(self) -> None:
        self.seen: dict[tuple, int] = {}
        self.won: dict[tuple, set[int]] = {}

    def worth_it(self, job: Job, count: int) -> list[int]:
        """Which of `count` kinds to try on a matrix."""
        key = self._key(job)
        return list(range(count)) if self.seen.get(key, 0) < _ENOUGH else sorted(self.won[key])

    def note(self, job: Job, best: int) -> None:
        key = self._key(job)
        self.seen[key] = self.seen.get(key, 0) + 1
        self.won.setdefault(key, set()).add(best)

    @staticmethod
    def _key(job: Job) -> tuple:
        return job.name.rpartition(".")[2], job.spec["in_features"], job.spec["out_features"], job.rule


def _tried(prepared: Prepared, job: Job, inputs: SecondMoment, judge: SecondMoment, forms: _Forms) -> list[Candidate]:
    """What the alternatives of a matrix, fitted to its inputs, cost by the moments of a judge: all sizes of the form that is
    best at the size it would have by itself."""
    method, whole = methods.load(job.rule.method), job.rule.options
    site = methods.Site(job.spec["in_features"], job.spec["out_features"])
    weight = prepared.source.read(f"{job.name}.weight").to(prepared.device, torch.float32)
    before = whole.model_dump()
    found: dict[str, Candidate] = {}

    def trial(options: methods.MethodConfig) -> Candidate | None:
        """The price of one alternative; None when it does not fit the matrix."""
        rule = job.rule.model_copy(update={"options": options})
        try:
            spec = job_spec(prepared.model, job.name, prepared.source, rule)
        except CompressError:
            return None
        key = json.dumps(spec, sort_keys=True)
        if key not in found:
            try:
                error, price = _priced(method, options, weight, inputs, judge, spec)
            except (ValueError, torch.linalg.LinAlgError) as failure:
                raise CompressError(f"{job.name}: {failure}") from failure
            # a size is stated in any case: it holds for another rule, too (`compress.earlier`)
            changed = {
                name: value for name, value in options.model_dump().items() if value != before[name] or name == "ratio"
            }
            found[key] = Candidate(changed, packed_bytes(spec), error, price)
        return found[key]

    kinds = _kinds(method, site, whole)
    worth_it = forms.worth_it(job, len(kinds))
    best = worth_it[0]
    if len(worth_it) > 1:
        prices = {index: tried.price for index in worth_it if (tried := trial(kinds[index])) is not None}
        best = min(prices, key=prices.__getitem__, default=best)
    forms.note(job, best)
    sizes = _alternatives(method, site, kinds[best])
    if len(sizes) > 1:
        found.clear()  # the other forms lost
    for options in sizes:
        trial(options)
    if not found:
        raise CompressError(f"{job.name}: nothing fits its budget; lower the ratio, or leave it out with `method: none`")
    return list(found.values())


def _priced(
    method: ModuleType,
    options: methods.MethodConfig,
    weight: Tensor,
    inputs: SecondMoment,
    judge: SecondMoment,
    spec: Spec,
) -> tuple[float, float]:
    """Relative output error and price of one way to store a matrix, from a sample of its neurons where that will do."""
    importance = inputs.importance_N
    every, share = _one_of(method, options, len(weight)), 1.0
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
