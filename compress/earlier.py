"""Trials of an earlier run, for another size: the candidates that its checkpoint keeps, spread under a new total.

A search spends most of its time on pricing candidates, and those prices say nothing of the total that they were wanted for.
A checkpoint carries them (`allocation.json`), so the same model at another size needs the knapsack and the run alone. The
candidates are those of the earlier size, half to one and a half times what it kept of a matrix, and all of it (of `resq` all
widths); the kind of dictionary is the one that was best there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import read_report
from compress.errors import CompressError
from compress.forms import open_jobs
from compress.jsonfile import read_json
from compress.layers import dense_bytes
from compress.lineage import Lineage
from compress.plan import HEAD, minds
from compress.prepare import Prepared
from compress.source import ALLOCATION
from compress.trials import Candidate

_SIZES = ("ratio", "target_size", "target_bits")
_SAME = {  # of a run's identity: what decides prices
    "model": "another model",
    "calibration tokens": "other calibration tokens",
    "compute dtype": "another compute dtype",
    "compress version": "another compress version",
}


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
    had = [words for key, words in _SAME.items() if report.identity.get(key) != identity[key]]
    if report.made_from != lineage.of(HEAD) and _SAME["model"] not in had:
        had.append(_SAME["model"])
    had += _changed_options(report.recipe.get("weights"), prepared.recipe.resolved()["weights"])
    if share := report.recipe.get("calibration", {}).get("token_weighting"):
        had.append(f"token_weighting {share}")
    if had:
        raise CompressError(f"the trials of {checkpoint} had {', '.join(had)}; give all but the size as it was there")
    record, candidates = read_json(file), {}
    try:
        tried = {name: record[name]["candidates"] for name in sorted(record)}
        for job in open_jobs(prepared.plan):
            found, options, dense = [Candidate(**one) for one in tried[job.name]], job.rule.options, dense_bytes(job.spec)
            for one in found:
                type(options)(**options.model_dump() | one.options)  # what nobody could have asked for was not tried
            candidates[job.name] = [one for one in found if options.keeps_enough(one.bytes, dense)]
    except (KeyError, TypeError, ValueError) as error:
        raise CompressError(f"{file} is damaged; search again without --trials-from") from error
    if not all(candidates.values()):
        raise CompressError(f"the trials of {checkpoint} are all too small for this size; search again")
    return Earlier(candidates, hashlib.sha256(json.dumps(tried, sort_keys=True).encode()).hexdigest())


def _changed_options(there: Any, here: Any) -> list[str]:
    """In words, the options of earlier weight rules that are no sizes and differ now."""
    theirs, ours = ([side or {}] if not isinstance(side, list) else side for side in (there, here))
    if len(theirs) != len(ours):
        return [f"{len(theirs)} weight rules"]
    return [
        f"{key} {old.get(key)} (here {new.get(key)})"
        for old, new in zip(theirs, ours, strict=True)
        for key in sorted({*old, *new})
        if key not in _SIZES and old.get(key) != new.get(key)
    ]
