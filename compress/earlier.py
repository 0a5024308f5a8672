"""Trials of an earlier run, for another size: the candidates that its checkpoint keeps, spread under a new total.

A search spends most of its time on pricing candidates, and those prices say nothing of the total that they were wanted for.
A checkpoint carries them (`allocation.json`), so the same model at another size needs the knapsack and the run alone. The
candidates are those of the earlier size, half to one and a half times what it kept of a matrix, and all of it; the kind of
dictionary is the one that was best there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import read_report
from compress.errors import CompressError
from compress.jsonfile import read_json
from compress.lineage import Lineage
from compress.methods._budget import LEAST_SHARE
from compress.passes import minds
from compress.plan import HEAD
from compress.prepare import Prepared
from compress.staging import ALLOCATION
from compress.trials import Candidate, open_jobs

_SIZES = ("ratio", "target_size", "target_bits")
_SAME = ("model", "calibration tokens", "compute dtype", "compress version")  # of a run's identity: what decides prices


@dataclass(frozen=True)
class Earlier:
    """Candidates that another run has tried, by matrix, and what tells them from any others."""

    candidates: dict[str, list[Candidate]]
    digest: str


def require_trials(checkpoint: Path, prepared: Prepared) -> None:
    """What can be seen before anything is read.

    Raises:
        CompressError: the checkpoint holds no trials, or what is asked for needs more than prices.
    """
    jobs = open_jobs(prepared.plan)
    if not (checkpoint / ALLOCATION).is_file():
        reason = "holds no trials" if checkpoint.exists() else "does not exist"
        raise CompressError(f"{checkpoint} {reason}; give --trials-from a checkpoint made by a search")
    if not jobs or any(job.rule.options.allocation != "search" for job in jobs):
        raise CompressError("--trials-from serves searches: every rule that leaves something open needs allocation: search")
    if prepared.recipe.calibration.token_weighting or any(minds(job, "weighting", "fisher") for job in jobs):
        raise CompressError("--trials-from has prices and no gradients; leave out token_weighting and weighting: fisher")


def read_earlier(checkpoint: Path, prepared: Prepared, identity: dict[str, str], lineage: Lineage) -> Earlier:
    """The trials that a checkpoint keeps, for a run with this identity; what leaves a matrix less than a search at this size
    would is left out.

    Raises:
        CompressError: they are damaged, or of another model or recipe, or all too small.
    """
    report, file = read_report(checkpoint), checkpoint / ALLOCATION
    if not report.made_from:  # the report is lost, or from before it was recorded
        raise CompressError(f"{checkpoint} does not say what its trials were made for; search again without --trials-from")
    changed = [key for key in _SAME if report.identity.get(key) != identity[key]]
    if report.made_from != lineage.of(HEAD) and "model" not in changed:
        changed.append("model")
    if _without_sizes(report.recipe.get("weights")) != _without_sizes(prepared.recipe.resolved()["weights"]):
        changed.append("weights rule")
    if report.recipe.get("calibration", {}).get("token_weighting"):
        changed.append("token_weighting")
    if changed:
        raise CompressError(f"the trials of {checkpoint} had another {' and '.join(changed)}; only the size may differ")
    record, candidates = read_json(file), {}
    try:
        tried = {name: record[name]["candidates"] for name in sorted(record)}
        for job in open_jobs(prepared.plan):
            least = LEAST_SHARE * (1 - job.rule.options.ratio) - 1e-9
            found = [Candidate(**candidate) for candidate in tried[job.name]]
            candidates[job.name] = [one for one in found if 1 - one.options["ratio"] >= least]
            if not candidates[job.name]:
                raise CompressError(f"the trials of {checkpoint} are all too small for this size; search again")
    except (KeyError, TypeError, ValueError) as error:
        raise CompressError(f"{file} is damaged; search again without --trials-from") from error
    return Earlier(candidates, hashlib.sha256(json.dumps(tried, sort_keys=True).encode()).hexdigest())


def _without_sizes(weights: Any) -> list[dict[str, Any]]:
    rules = weights if isinstance(weights, list) else [weights or {}]
    return [{key: value for key, value in rule.items() if key not in _SIZES} for rule in rules]
