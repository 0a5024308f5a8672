"""What a rule leaves open for a matrix, and which forms of it are still worth a trial.

A method lists kinds (dictionaries, widths) to compare at equal bytes and sizes to try of one kind (`compress.methods`).
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType

from torch import nn

from compress import methods
from compress.errors import CompressError
from compress.layers import Spec, dense_bytes, packed_bytes
from compress.plan import HEAD, Job, Plan, job_spec, minds, planned_bytes
from compress.report import megabytes
from compress.source import Source

_NEURONS = 256  # of a matrix, at least, where they are tried one by one
_ENOUGH = 3  # matrices of one name in which a form never was the best


def open_jobs(plan: Plan) -> list[Job]:
    """The jobs that something is tried for, and those that ask for sensitivities."""
    return [job for job in plan.jobs if is_open(job) or minds(job, "weighting", "fisher")]


def is_open(job: Job) -> bool:
    """Whether how a matrix is stored remains to be decided."""
    if job.block == HEAD:
        return False
    return len(kinds_of(job)) > 1 or sizes_of(job, job.rule.options) != [job.rule.options]


def kinds_of(job: Job) -> list[methods.MethodConfig]:
    """Forms to compare at equal bytes."""
    method, options = methods.load(job.rule.method), job.rule.options
    return method.kinds(_site(job), options) if hasattr(method, "kinds") else [options]


def sizes_of(job: Job, form: methods.MethodConfig) -> list[methods.MethodConfig]:
    """Sizes to try of one form."""
    method = methods.load(job.rule.method)
    return method.alternatives(_site(job), form) if hasattr(method, "alternatives") else [form]


def own_size(job: Job, form: methods.MethodConfig) -> list[methods.MethodConfig]:
    """What may be tried of one form at the matrix's own share of bytes."""
    return sizes_of(job, form.model_copy(update={"allocation": "uniform"}))


def spec_of(model: nn.Module, source: Source, job: Job, options: methods.MethodConfig) -> Spec | None:
    """The spec of one way to store a matrix; None where it does not fit, or leaves less than a search by its rule may."""
    spec = _fitting(model, source, job, options)
    if spec is None or not minds(job, "allocation", "search"):
        return spec
    return spec if job.rule.options.keeps_enough(packed_bytes(spec), dense_bytes(spec)) else None


def _fitting(model: nn.Module, source: Source, job: Job, options: methods.MethodConfig) -> Spec | None:
    try:
        return job_spec(model, job.name, source, job.rule.model_copy(update={"options": options}))
    except CompressError:
        return None


def require_room(model: nn.Module, source: Source, plan: Plan) -> None:
    """Refuse a search for a size that the smallest forms of its matrices do not reach, before anything is tried.

    Raises:
        CompressError: with the bytes that they take; or all forms of a matrix are too small.
    """
    for rule in dict.fromkeys(job.rule for job in plan.jobs if minds(job, "allocation", "search")):
        searched = [job for job in plan.jobs if job.rule == rule and job.block != HEAD]
        limit, least = sum(map(planned_bytes, searched)), 0
        counts = Counter(map(_key, searched))
        for key, job in {_key(job): job for job in searched}.items():  # those that are alike have the same forms
            forms = [form for kind in kinds_of(job) for form in sizes_of(job, kind)]
            sizes = [packed_bytes(spec) for form in forms if (spec := spec_of(model, source, job, form))]
            if not sizes and any(_fitting(model, source, job, form) for form in forms):
                raise CompressError(
                    f"recipe: {job.name}: its largest forms keep less of it than a search at ratio {rule.options.ratio:g} "
                    "may; raise the ratio, or give wider codes"
                )
            least += counts[key] * min(sizes, default=0)
        if least > limit:
            raise CompressError(
                f"recipe: the smallest forms of {', '.join(rule.targets)} take {megabytes(least)}, the budget leaves them "
                f"{megabytes(limit)}; choose a larger size"
            )


def one_of(method: ModuleType, options: methods.MethodConfig, neurons: int) -> int:
    """One of how many neurons is tried."""
    alone = hasattr(method, "solves_neurons_alone") and method.solves_neurons_alone(options)
    return max(1, neurons // _NEURONS) if alone else 1


def _site(job: Job) -> methods.Site:
    return methods.Site(job.spec["in_features"], job.spec["out_features"])


def _key(job: Job) -> tuple:
    """Equal for matrices that are alike: name, sizes and rule."""
    return job.name.rpartition(".")[2], job.spec["in_features"], job.spec["out_features"], job.rule


class Forms:
    """The kinds of dictionary that are still worth a trial, by the matrix's name, sizes and rule."""

    def __init__(self) -> None:
        self.seen: dict[tuple, int] = {}
        self.won: dict[tuple, set[int]] = {}

    def worth_it(self, job: Job, count: int) -> list[int]:
        """Which of `count` kinds to try on a matrix."""
        key = _key(job)
        return list(range(count)) if self.seen.get(key, 0) < _ENOUGH else sorted(self.won[key])

    def note(self, job: Job, best: int) -> None:
        key = _key(job)
        self.seen[key] = self.seen.get(key, 0) + 1
        self.won.setdefault(key, set()).add(best)
