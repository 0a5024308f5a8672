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
from compress.passes import minds
from compress.plan import Job
from compress.recipe import Recipe
from compress.trials import Candidate

FILE = "allocation.json"
_SIZES = ("ratio", "target_size", "target_bits")
_SAME = ("model", "calibration tokens", "compute dtype")  # of what a run is known by: what decides prices


@dataclass(frozen=True)
class Earlier:
    """Candidates that another run has tried, by matrix, and what tells them from any others."""

    candidates: dict[str, list[Candidate]]
    digest: str


def read_earlier(checkpoint: Path, recipe: Recipe, jobs: list[Job], identity: dict[str, str]) -> Earlier:
    """The trials that a checkpoint keeps, for the open `jobs` of a run with this recipe and identity.

    Raises:
        CompressError: it holds none, or another model's, or what is asked for needs more than prices.
    """
    file = checkpoint / FILE
    if not file.is_file():
        raise CompressError(f"{checkpoint} holds no trials; give --trials-from a checkpoint made by a search")
    if not jobs or any(job.rule.options.allocation != "search" for job in jobs):
        raise CompressError("--trials-from serves searches: every rule that leaves something open needs allocation: search")
    if recipe.calibration.token_weighting or any(minds(job, "weighting", "fisher") for job in jobs):
        raise CompressError("--trials-from has prices and no gradients; leave out token_weighting and weighting: fisher")
    report = read_report(checkpoint)
    changed = [key for key in _SAME if report.identity.get(key) != identity[key]]
    if _without_sizes(report.recipe.get("weights")) != _without_sizes(recipe.resolved()["weights"]):
        changed.append("weights rule")
    if report.recipe.get("calibration", {}).get("token_weighting"):
        changed.append("token_weighting")
    if changed:
        raise CompressError(f"the trials of {checkpoint} had another {' and '.join(changed)}; only the size may differ")
    record = read_json(file)
    try:
        tried = {name: record[name]["candidates"] for name in sorted(record)}
        candidates = {name: [Candidate(**candidate) for candidate in of_one] for name, of_one in tried.items()}
        if candidates.keys() != {job.name for job in jobs}:
            raise ValueError("other matrices")
        if any("ratio" not in one.options for of_one in candidates.values() for one in of_one):
            raise ValueError("candidates without a size")
    except (KeyError, TypeError, ValueError) as error:
        raise CompressError(f"{file} is damaged ({error}); search again without --trials-from") from error
    return Earlier(candidates, hashlib.sha256(json.dumps(tried, sort_keys=True).encode()).hexdigest())


def _without_sizes(weights: Any) -> list[dict[str, Any]]:
    rules = weights if isinstance(weights, list) else [weights or {}]
    return [{key: value for key, value in rule.items() if key not in _SIZES} for rule in rules]
