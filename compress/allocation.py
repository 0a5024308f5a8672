"""What is decided by trial, before the real run: the kind of dictionary, the width of the codes, the bytes of every matrix.

Every matrix has its candidates and their prices (`compress.trials`); the bytes of all matrices of a rule with
`allocation: search` are spread at the least total price (`compress.knapsack`), others take their cheapest candidate.

The prices add up errors as if they did not interact; that holds for small ones. `allocation.json` in the checkpoint keeps
the candidates of every matrix.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compress.blockwise import Progress
from compress.calibrate import data
from compress.earlier import Earlier
from compress.errors import CompressError
from compress.forms import open_jobs
from compress.jsonfile import read_json
from compress.knapsack import choose
from compress.layers import dense_bytes
from compress.passes import Passes
from compress.plan import Job, Plan, job_spec
from compress.prepare import Prepared
from compress.report import megabytes
from compress.source import ALLOCATION
from compress.tensorfile import read_header, write_file, write_whole
from compress.trials import Candidate, Trials, run_trials

SENSITIVITY = "sensitivity.safetensors"


def find(prepared: Prepared, tokens: data.Tokens, staging: Path, progress: Progress, earlier: Earlier | None = None) -> None:
    """Leave in `staging` how every matrix is stored and what the output minds of it, if the recipe asks for that and it is
    not there yet; the trials of an `earlier` run are taken in place of new ones.

    Raises:
        CompressError: nothing fits a matrix, or the budget.
    """
    jobs = open_jobs(prepared.plan)
    if not Passes(prepared, jobs, tokens.count).needed or is_found(staging, jobs):
        return
    found = Trials(earlier.candidates, {}, {}) if earlier else run_trials(prepared, jobs, tokens, staging, progress)
    if jobs:
        way_out = "lower the ratio" if earlier is None else "search again without --trials-from"
        chosen = _choices(jobs, found.candidates, way_out, progress)
        record = {
            job.name: {"chosen": chosen[job.name], "candidates": [asdict(c) for c in found.candidates[job.name]]}
            for job in jobs
        }
        write_whole(staging / ALLOCATION, [json.dumps(record, indent=1).encode()])
    kinds = {"outputs": found.outputs, "tokens": found.tokens}
    tensors = {f"{kind}.{name}": tensor for kind, of_kind in kinds.items() for name, tensor in of_kind.items()}
    write_file(staging / SENSITIVITY, tensors)  # last: it says that all is there


def is_found(staging: Path, jobs: list[Job]) -> bool:
    """Whether what `find` leaves is there."""
    return (staging / SENSITIVITY).exists() and (not jobs or (staging / ALLOCATION).exists())


def allocated(prepared: Prepared, tokens: data.Tokens, staging: Path) -> Prepared:
    """The run with every matrix decided and what the output minds of each, as `find` left them.

    Raises:
        CompressError: damaged files, by name.
    """
    jobs = open_jobs(prepared.plan)
    if not Passes(prepared, jobs, tokens.count).needed:
        return prepared
    file, plan = staging / SENSITIVITY, prepared.plan
    try:
        stored = read_header(file)
        outputs = {name.removeprefix("outputs."): t.read() for name, t in stored.items() if name.startswith("outputs.")}
        weights = {name.removeprefix("tokens."): t for name, t in stored.items() if name.startswith("tokens.")}
        if any(tensor.shape != tuple(tokens.ids.shape) for tensor in weights.values()):
            raise ValueError("weights of other tokens")
        if jobs:
            file = staging / ALLOCATION
            settled = {name: entry["candidates"][entry["chosen"]]["options"] for name, entry in read_json(file).items()}
            plan = _settled(prepared, {job.name: settled[job.name] for job in jobs})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CompressError(f"{file} is damaged; remove {staging} to start again") from error
    return replace(prepared, plan=plan, sensitivity=outputs, token_weights=weights)


def _settled(prepared: Prepared, options: dict[str, dict[str, Any]]) -> Plan:
    """The plan with the chosen options in place of the open ones."""
    jobs = []
    for job in prepared.plan.jobs:
        if job.name in options:
            rule = job.rule.model_copy(update={"options": job.rule.options.model_copy(update=options[job.name])})
            job = replace(job, rule=rule, spec=job_spec(prepared.model, job.name, prepared.source, rule))
        jobs.append(job)
    return replace(prepared.plan, jobs=tuple(jobs))


def _choices(jobs: list[Job], found: dict[str, list[Candidate]], way_out: str, progress: Progress) -> dict[str, int]:
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
            raise CompressError(f"the search finds no room: {error} bytes; {way_out}") from error
        total = sum(row[pick] for row, pick in zip(prices, picks, strict=True))
        size, used = megabytes(limit), sum(row[pick] for row, pick in zip(sizes, picks, strict=True))
        progress.note(f"search: at {size} errors add up to {total:.3f} nats per token, a low estimate of the KL divergence")
        if sum(map(max, sizes)) < 0.99 * limit:
            progress.note(f"search: only {megabytes(used)} are used, because no larger forms of the matrices were tried")
        chosen.update({job.name: pick for job, pick in zip(mine, picks, strict=True)})
    return chosen
