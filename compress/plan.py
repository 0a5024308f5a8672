"""What a recipe will do to a model, decided once and used by every stage: dry run, solving, saving, reporting."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from compress import methods
from compress.budget import needs_budget, settled
from compress.cache import packed_layers
from compress.errors import CompressError
from compress.layers import Spec, dense_bytes, packed_bytes
from compress.model import Source, decoder_blocks, head_width, inputs_of, is_tied, kv_heads, output_head
from compress.recipe import Recipe, Rule
from compress.suggest import unknown

HEAD = -1  # the "block" of the output projection


@dataclass(frozen=True)
class Job:
    """One matrix: its module name, block, storage spec and the rule that chose it."""

    name: str
    block: int
    spec: Spec
    rule: Rule


@dataclass(frozen=True)
class Plan:
    """All jobs of a run, in order, with what is left alone."""

    blocks_name: str
    num_blocks: int
    jobs: tuple[Job, ...]
    notes: tuple[str, ...] = ()
    others: dict[str, Spec] = field(default_factory=dict)  # layers of our own that replace no matrix
    cache: dict[str, Any] | None = None  # what a loaded model makes its KV caches from, see compress.cache.attached

    @cached_property
    def by_block(self) -> dict[int, list[Job]]:
        """The jobs of every block that has any."""
        found: dict[int, list[Job]] = {}
        for job in self.jobs:
            found.setdefault(job.block, []).append(job)
        return found

    @property
    def dense_bytes(self) -> int:
        return sum(dense_bytes(job.spec) for job in self.jobs)


def make_plan(model: nn.Module, source: Source, recipe: Recipe) -> Plan:
    """Match targets and derive every storage spec.

    Raises:
        CompressError: a pattern matches no linear layer, a tied head is targeted, or a ratio cannot be met, by name.
    """
    blocks_name, blocks = decoder_blocks(model)
    head = output_head(model)
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: every[name] for name in every if name.startswith(blocks_name + ".") or name == head}
    routers = {name for name in linears if _is_router(model, name, linears[name])}
    candidates = {name: module for name, module in linears.items() if name not in routers}
    _require_matches(model, recipe, candidates)
    recipe = _budgeted(model, source, recipe, candidates, blocks_name)
    jobs = []
    for name in candidates:
        rule = recipe.rule_for(name)
        if rule is None:
            continue
        if name == head and is_tied(model):
            raise CompressError(f"{name} shares its weight with the input embedding and cannot be compressed; leave it out")
        if f"{name}.weight" not in source.tensors:
            raise CompressError(f"the checkpoint holds no {name}.weight; its names are not those of this architecture")
        jobs.append(Job(name, block_of(name, blocks_name), job_spec(model, name, source, rule), rule))
    if not jobs:
        raise CompressError("the recipe leaves every layer as it is; give a rule with a method")
    unmatched = [
        name
        for name in candidates
        if name != head and "experts" not in name and not any(rule.matches(name) for rule in recipe.weights)
    ]
    notes = _notes(blocks_name, blocks, routers, unmatched, every.keys() - linears.keys())
    return Plan(blocks_name, len(blocks), tuple(jobs), notes)


def _budgeted(model: nn.Module, source: Source, recipe: Recipe, linears: dict[str, nn.Linear], blocks_name: str) -> Recipe:
    """The recipe with the sizes that its rules ask for turned into ratios; other rules' matrices count as they will be."""
    sized = [number for number, rule in enumerate(recipe.weights) if getattr(rule.options, "target_size", None) is not None]
    if len(sized) > 1:
        raise CompressError("recipe: target_size is that of the whole checkpoint; give it in one rule, not in several")
    for number in sorted(range(len(recipe.weights)), key=sized.__contains__):  # it takes what all others leave
        rule = recipe.weights[number]
        if not needs_budget(rule.options):
            continue
        mine, other = 0, source.stored_bytes + added_bytes(model, recipe)
        for name, module in linears.items():
            tensor, chosen = source.tensors.get(f"{name}.weight"), recipe.rule_for(name)
            if tensor is None or chosen is None:
                continue
            other -= tensor.num_bytes
            if chosen is rule:
                mine += 2 * module.in_features * module.out_features
            else:
                spec = job_spec(model, name, source, chosen)
                other += planned_bytes(Job(name, block_of(name, blocks_name), spec, chosen))
        if not mine:
            raise CompressError(f"recipe: earlier rules take all that {', '.join(rule.targets)} matches; drop this rule")
        rules = list(recipe.weights)
        rules[number] = rule.model_copy(update={"options": settled(rule.options, mine, other)})
        recipe = recipe.model_copy(update={"weights": tuple(rules)})
    return recipe


def added_bytes(model: nn.Module, recipe: Recipe) -> int:
    """What a recipe adds to a checkpoint: the final norm, which a rotation makes a matrix of where the embedding is tied,
    and a KV cache's bases and metrics in fp32."""
    config, kv = model.config.get_text_config(decoder=True), recipe.kv_cache
    wanted = recipe.rotations(config.hidden_size, head_width(model))
    turned = any(each.turns_stream for each in wanted)
    norm = 2 * config.hidden_size**2 if turned and is_tied(model) else 0
    if kv is None:
        return norm
    folded = any(each.heads != "none" for each in wanted)  # v_proj is in its basis already
    based = config.num_hidden_layers * (1 if folded else 2) if kv.basis != "none" else 0
    measured = len(packed_layers(config)) if kv.metric == "calibration" else 0
    return norm + 4 * (based + measured) * kv_heads(model) * head_width(model) ** 2


def minds(job: Job, option: str, value: str) -> bool:
    """Whether a job's rule has an option of this value; the head is not part of any search."""
    return job.block != HEAD and getattr(job.rule.options, option, None) == value


def planned_bytes(job: Job) -> float:
    """Bytes of a matrix as planned; its share where trials decide what fills that."""
    options = job.rule.options
    is_open = job.block != HEAD and options.fills_its_share()
    return (1 - options.ratio) * dense_bytes(job.spec) if is_open else packed_bytes(job.spec)


def job_spec(model: nn.Module, name: str, source: Source, rule: Rule) -> Spec:
    """The storage spec that a rule's method plans for a matrix; CompressError when it cannot be met, by name."""
    module = model.get_submodule(name)
    inputs, heads = inputs_of(model, name, module)
    site = methods.Site(module.in_features, module.out_features, inputs, heads)
    try:
        sizes = methods.load(rule.method).plan(site, rule.options)
    except ValueError as error:
        raise CompressError(
            f"{name}: {error}; change the rule's options or leave it out with a rule `method: none`"
        ) from error
    bias = source.tensors.get(f"{name}.bias")
    return {
        **sizes,
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": str(bias.dtype).removeprefix("torch.") if module.bias is not None and bias else False,
    }


def block_of(name: str, blocks_name: str) -> int:
    """The number of the decoder block that a module or tensor belongs to; HEAD for what lies outside."""
    return int(name[len(blocks_name) + 1 :].split(".")[0]) if name.startswith(blocks_name + ".") else HEAD


def _require_matches(model: nn.Module, recipe: Recipe, linears: dict[str, nn.Linear]) -> None:
    for rule in recipe.weights:
        for pattern in rule.targets:
            one = Rule(method=rule.method, targets=(pattern,))
            if any(one.matches(name) for name in linears):
                continue
            others = {name: type(module).__name__ for name, module in model.named_modules() if name and one.matches(name)}
            if others:
                name, kind = next(iter(others.items()))
                raise CompressError(f"target {pattern!r} matches {name}, a {kind}; only nn.Linear layers are compressed")
            leaves = {f"*{name.rpartition('.')[2]}" for name in linears}
            raise CompressError(unknown("target", pattern, leaves).replace("unknown", "no linear layer matches", 1))


def _is_router(model: nn.Module, name: str, module: nn.Linear) -> bool:
    config = model.config.get_text_config(decoder=True)
    experts = {getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")} - {None}
    return bool(experts) and name.rpartition(".")[2] in {"gate", "router", "shared_expert_gate"}


def _notes(
    blocks_name: str, blocks: nn.ModuleList, routers: set[str], unmatched: list[str], elsewhere: set[str]
) -> tuple[str, ...]:
    notes = []
    experts = sum("experts" in name for name, _ in blocks.named_parameters())
    if experts or routers:
        notes.append(f"left as they are: {experts} expert tensors and the routers of a mixture-of-experts model")
    if unmatched:
        leaves = sorted({name.rpartition(".")[2] for name in unmatched})
        notes.append(
            f"left as they are: {len(unmatched)} linears of the blocks that no target matches ({', '.join(leaves)})"
        )
    if elsewhere:
        towers = sorted({_apart(name, blocks_name) for name in elsewhere})
        notes.append(f"left as they are: {len(elsewhere)} linears outside the decoder's blocks ({', '.join(towers)})")
    return tuple(notes)


def _apart(name: str, blocks_name: str) -> str:
    """The largest module around a module that holds no decoder block, e.g. a vision tower."""
    parts = name.split(".")
    ancestors = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return next(ancestor for ancestor in ancestors if not blocks_name.startswith(ancestor + "."))
