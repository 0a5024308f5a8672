"""What is decided by trial, before the real run: the kind of dictionary, the width of the codes, the bytes of every matrix.

Every matrix is compressed in the ways its rule leaves open (`kinds` and `alternatives` of its method), on statistics of the
original model, and each is priced by what it does to the output. For rules with `allocation: search` an error counts by the
sensitivity of the output neuron and of the tokens it falls on (`compress.calibrate.sensitivity`), in nats of KL per token:

    1/2 sum over output neurons n of f_n (w_n - what_n) E[s x x^T] / E[s] (w_n - what_n)^T

and the bytes of all matrices of the rule are spread at the least total price (`compress.knapsack`). Without search f is one:
alternatives of one matrix are compared by its output error at equal bytes.

Two things keep trials short. Where every neuron is solved for itself (unit vectors), one of every few neurons is tried, in
the order of their sensitivities. And a form of dictionary that was the best for none of the first `_ENOUGH` matrices of a
name is not tried on the others of that name.

The prices add up errors as if they did not interact; that holds for small ones. `allocation.json` in the checkpoint keeps
the candidates of every matrix. Cost: one pass of the block loop, a backward one for a search, and the trials.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
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
from compress.calibrate.blocks import BlockRunner
from compress.calibrate.sensitivity import Sensitivity, StoredStates, output_gradients, through_block
from compress.errors import CompressError
from compress.jsonfile import read_json
from compress.knapsack import choose
from compress.layers import Spec, dense_bytes, packed_bytes
from compress.linalg import SecondMoment, relative
from compress.memory import give_back_freed_memory
from compress.model import build_skeleton, materialise, materialise_head, release
from compress.plan import HEAD, Job, Plan, job_spec
from compress.prepare import Prepared
from compress.tensorfile import read_header, write_file, write_whole

FILE = "allocation.json"
_SENSITIVITY = "sensitivity.safetensors"
_TOKENS = 16384  # enough to rank alternatives by; the real run takes all of them
_NEURONS = 256  # of a matrix, at least, where they are tried one by one
_ENOUGH = 4  # matrices of one name in which a form never was the best
_BACKWARD = 8192  # tokens for sensitivities: a mean of what a neuron's error does
_BATCH_TOKENS = 1024  # the logits of a batch and their gradients are held at once


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix: the options that differ from its rule, bytes, relative output error and price."""

    options: dict[str, Any]
    bytes: int
    error: float
    price: float


def allocated(prepared: Prepared, tokens: data.Tokens, staging: Path, progress: Progress) -> Prepared:
    """The same run with every matrix decided; the decisions are kept in `staging` and used again by a resumed run.

    Raises:
        CompressError: nothing fits a matrix, or the budget.
    """
    jobs = [job for job in prepared.plan.jobs if _is_open(job) or _minds(job, "weighting", "fisher")]
    if not jobs:
        return prepared
    file = staging / FILE
    if not file.exists():
        found, sensitivity = _trials(prepared, jobs, tokens, staging, progress)
        write_file(staging / _SENSITIVITY, sensitivity)
        chosen = _choices(jobs, found, progress)
        record = {job.name: {"chosen": chosen[job.name], "candidates": [asdict(c) for c in found[job.name]]} for job in jobs}
        write_whole(file, [json.dumps(record, indent=1).encode()])
    record = read_json(file)
    try:
        settled = {name: entry["candidates"][entry["chosen"]]["options"] for name, entry in record.items()}
        plan = _settled(prepared, {job.name: settled[job.name] for job in jobs})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CompressError(f"{file} is damaged; remove {staging} to start again") from error
    sensitivity = {name: tensor.read() for name, tensor in read_header(staging / _SENSITIVITY).items()}
    return replace(prepared, plan=plan, sensitivity=sensitivity)


def _minds(job: Job, option: str, value: str) -> bool:
    """Whether a job's rule has an option of this value; the head is not part of any search."""
    return job.block != HEAD and getattr(job.rule.options, option, None) == value


def _is_open(job: Job) -> bool:
    method, options = methods.load(job.rule.method), job.rule.options
    site = methods.Site(job.spec["in_features"], job.spec["out_features"])
    return job.block != HEAD and len(_kinds(method, site, options)) * len(_alternatives(method, site, options)) > 1


def trial_flops(prepared: Prepared) -> float:
    """Operations of the pass that decides what the rules leave open; 0 where nothing is open."""
    jobs = [job for job in prepared.plan.jobs if _is_open(job)]
    if not jobs:
        return 0.0
    options = prepared.recipe.calibration
    tokens = min(_TOKENS, options.samples * options.length)
    weights = sum(job.spec["in_features"] * job.spec["out_features"] for job in prepared.plan.jobs)
    # of a search: there, once more for the Gram matrices, and there and back for half of the tokens
    passes = 3.5 if any(_minds(job, "allocation", "search") for job in jobs) else 1
    total = 2.0 * tokens * weights * passes
    if passes > 1:  # moments that count tokens by their gradients, of every matrix
        total += 1.2 * min(_BACKWARD, tokens) * sum(job.spec["in_features"] ** 2 for job in prepared.plan.jobs)
    forms = _Forms()
    for job in jobs:
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


def _one_of(method: ModuleType, options: methods.MethodConfig, neurons: int) -> int:
    """One of how many neurons is tried."""
    alone = hasattr(method, "solves_neurons_alone") and method.solves_neurons_alone(options)
    return max(1, neurons // _NEURONS) if alone else 1


def _kinds(method: ModuleType, site: methods.Site, options: methods.MethodConfig) -> list[methods.MethodConfig]:
    return method.kinds(site, options) if hasattr(method, "kinds") else [options]


def _alternatives(method: ModuleType, site: methods.Site, options: methods.MethodConfig) -> list[methods.MethodConfig]:
    return method.alternatives(site, options) if hasattr(method, "alternatives") else [options]


def _settled(prepared: Prepared, options: dict[str, dict[str, Any]]) -> Plan:
    """The plan with the chosen options in place of the open ones."""
    jobs = []
    for job in prepared.plan.jobs:
        if job.name in options:
            rule = job.rule.model_copy(update={"options": job.rule.options.model_copy(update=options[job.name])})
            job = replace(job, rule=rule, spec=job_spec(prepared.model, job.name, prepared.source, rule))
        jobs.append(job)
    return replace(prepared.plan, jobs=tuple(jobs))


def _trials(
    prepared: Prepared, jobs: list[Job], tokens: data.Tokens, staging: Path, progress: Progress
) -> tuple[dict[str, list[Candidate]], dict[str, Tensor]]:
    """Candidates of every matrix, and the sensitivities of its outputs if any rule asks for them."""
    model = build_skeleton(prepared.source.path)  # of its own: it is left with weights in it
    prepared = replace(prepared, model=model)
    few = tokens.first(_TOKENS)
    found: dict[str, list[Candidate]] = {}
    sensitivity: dict[str, Tensor] = {}
    searched = any(_minds(job, "allocation", "search") for job in jobs)
    backwards = searched or any(_minds(job, "weighting", "fisher") for job in jobs)
    progress.note(f"{'searching for' if searched else 'trying'} the best form of {len(jobs)} matrices on {few.count} tokens")
    runner = start_runner(prepared, few, batch_tokens=_BATCH_TOKENS)
    forms = _Forms()
    passes = _backwards(prepared, runner, staging / "states") if backwards else _forwards(prepared, runner)
    for index, gradients in passes:
        here = [job for job in jobs if job.block == index]
        linears = {job.name: model.get_submodule(job.name) for job in here}
        if here:
            grams = runner.grams(index, linears, keep=False)
        minded: dict[str, Sensitivity] = {}
        if gradients is not None:
            gradients[:], minded = through_block(runner, index, gradients, linears)
            sensitivity.update({name: one.outputs_N for name, one in minded.items()})
        moments: dict[int, SecondMoment] = {}
        for job in here:
            moments.setdefault(id(grams[job.name]), second_moment(grams[job.name]))
            inputs = judge = moments[id(grams[job.name])].for_outputs(sensitivity.get(job.name))
            if job.name in minded and minded[job.name].inputs_II is not None:
                judge = SecondMoment(minded[job.name].inputs_II)
            found[job.name] = _tried(prepared, job, inputs, judge, forms)
        if len(found) * 5 // len(jobs) > (len(found) - len(here)) * 5 // len(jobs):
            progress.note(f"tried {len(found)} of {len(jobs)} matrices")
        give_back_freed_memory()
    return found, sensitivity


def _forwards(prepared: Prepared, runner: BlockRunner) -> Iterator[tuple[int, None]]:
    """Each block in turn, with its weights and its inputs in `runner.hidden`."""
    for index in range(prepared.plan.num_blocks):
        prefix = f"{prepared.plan.blocks_name}.{index}."
        materialise(prepared.model, prepared.source, prefix, prepared.dtype, prepared.device)
        yield index, None
        runner.run(index, keep=True)
        release(prepared.model, prefix)


def _backwards(prepared: Prepared, runner: BlockRunner, folder: Path) -> Iterator[tuple[int, list[Tensor]]]:
    """Each block from the last to the first, with its weights, its inputs in `runner.hidden` and the gradients behind it;
    who takes them puts those before the block in their place."""
    states, model, plan = StoredStates(folder), prepared.model, prepared.plan
    for index, _ in _forwards(prepared, runner):
        states.put(index, runner.hidden)
    materialise_head(model, prepared.source, plan.blocks_name, prepared.dtype, prepared.device)
    gradients = output_gradients(runner, max(1, _BACKWARD // runner.batches[0][0].numel()))
    for index in reversed(range(plan.num_blocks)):
        prefix = f"{plan.blocks_name}.{index}."
        materialise(model, prepared.source, prefix, prepared.dtype, prepared.device)
        runner.hidden = states.get(index)
        yield index, gradients
        release(model, prefix)
    shutil.rmtree(folder)


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
            changed = {name: value for name, value in options.model_dump().items() if value != before[name]}
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


def _choices(jobs: list[Job], found: dict[str, list[Candidate]], progress: Progress) -> dict[str, int]:
    """The index of every matrix's candidate: the best of each, or the best of all under the rule's total."""
    chosen: dict[str, int] = {}
    for rule in dict.fromkeys(job.rule for job in jobs):
        mine = [job for job in jobs if job.rule == rule]
        if rule.options.allocation == "uniform":
            for job in mine:
                prices = [candidate.price for candidate in found[job.name]]
                chosen[job.name] = prices.index(min(prices))
            continue
        limit = int((1 - rule.options.ratio) * sum(dense_bytes(job.spec) for job in mine))
        sizes = [[candidate.bytes for candidate in found[job.name]] for job in mine]
        prices = [[candidate.price for candidate in found[job.name]] for job in mine]
        try:
            picks = choose(sizes, prices, limit)
        except ValueError as error:
            raise CompressError(f"the search finds no room: {error} bytes; lower the ratio") from error
        total = sum(row[pick] for row, pick in zip(prices, picks, strict=True))
        progress.note(f"search: predicted KL {total:.3f} nats per token at {limit / 1e6:.1f} MB")
        chosen.update({job.name: pick for job, pick in zip(mine, picks, strict=True)})
    return chosen
