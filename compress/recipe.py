"""A recipe is the whole experiment: flat YAML in, frozen pydantic models out.

    model: HuggingFaceTB/SmolLM2-135M-Instruct      # optional default
    calibration: {dataset: wikitext2, samples: 128, length: 1024, seed: 0}
    weights: {method: cospadi, ratio: 0.2, targets: ["*_proj"]}      # or a list of rules, first match wins

Every key is known to somebody: an unknown one is an error that names the nearest valid spelling. Method options are
checked by the method's own `Config`. Nothing is read from environment variables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress import methods
from compress.cache import read_config
from compress.cache.layer import CacheConfig
from compress.errors import CompressError
from compress.shipped import read_text, shipped
from compress.suggest import unknown

__all__ = ["Calibration", "KvCache", "Recipe", "Refine", "Rule", "read_text", "shipped"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """Which tokens the statistics are gathered on."""

    dataset: str = Field("wikitext2", description="hub id, wikitext2, c4, python-docs, or a .txt/.jsonl/.parquet file")
    config: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    column: str = Field("text", description="text column of .jsonl, .parquet and hub data")
    samples: int = Field(128, ge=1, description="number of sequences")
    length: int = Field(1024, ge=2, le=1 << 20, description="tokens per sequence")
    seed: int = Field(0, ge=0, le=methods.MAX_SEED, description="which stretches of the text are taken")
    layout: Literal["stream", "documents"] = Field(
        "stream", description="stream: documents joined and cut to full length; documents: one each, padded"
    )
    chat_template: bool = Field(False, description="format rows as chats (columns messages, or instruction/input/output)")
    inputs: Literal["compressed", "original", "paired"] = Field(
        "compressed",
        description="statistics of a block: after compressed predecessors, in the original model, or paired: what comes "
        "from compressed predecessors is fitted to what the original would answer",
    )
    paired_share: float = Field(
        0.25, gt=0, le=1, description="how much of the difference between the two a paired fit makes good"
    )
    token_weighting: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share in a token's weight of how much the model's output minds errors there; 0: all count alike, "
        "else a backward pass over the calibration text is taken",
    )


class Refine(_Strict):
    """Whether a block's packed layers are fitted together once its solvers are done; see `compress.refine`."""

    epochs: int = Field(0, ge=0, description="passes over the calibration tokens for every block; 0: none")
    rate: float = Field(0.01, gt=0, le=1, description="Adam's first step, relative to the root mean square of a tensor")


class Rule(_Strict):
    """One method, its targets and its options."""

    method: str
    targets: tuple[str, ...] = ("*_proj",)
    options: methods.MethodConfig | None = None

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.targets)

    def rotation(self, hidden_size: int, head_dim: int) -> Any:
        """The `compress.bases.Wanted` of a method that rotates the model first; None for the others."""
        ask = getattr(methods.load(self.method), "rotation", None) if self.options else None
        return ask(self.options, hidden_size, head_dim) if ask else None

    def resolved(self) -> dict[str, Any]:
        """The rule as it would be written, every default filled in."""
        options = self.options.model_dump() if self.options else {}
        return {"method": self.method, "targets": list(self.targets), **options}


_SIZES = {"ratio", "target_size", "target_bits"}  # ways to say how large a rule's matrices may be
_OF_ALL_CACHES = ("method", "basis", "high_share", "query_share", "metric")


class KvCache(_Strict):
    """How keys and values are kept during generation; `options` are those of the cache's method."""

    method: str = "per_token"
    basis: Literal["pca", "hadamard", "none"] = Field("none", description="in which keys (and values) are quantized")
    high_share: float = Field(0.0, ge=0, le=0.5, description="share of a head's channels in high precision")
    query_share: float = Field(
        0.0, ge=0, le=1, description="pca: share of the queries' moments in what picks the keys' directions"
    )
    metric: Literal["prompt", "calibration"] = Field(
        "prompt",
        description="squat: queries of the prompt, one metric per conversation, or of the calibration text, one for all",
    )
    options: CacheConfig

    def resolved(self) -> dict[str, Any]:
        """The block as it would be written, every default filled in."""
        return {name: getattr(self, name) for name in _OF_ALL_CACHES} | self.options.model_dump()


class Recipe(_Strict):
    """A checked recipe. `weights` is a list of rules; the rule `method: none` leaves its targets as they are."""

    model: str | None = None
    calibration: Calibration = Calibration()
    weights: tuple[Rule, ...]
    refine: Refine = Refine()
    kv_cache: KvCache | None = None

    @model_validator(mode="after")
    def _refined_inputs(self) -> Recipe:
        if self.refine.epochs and self.calibration.inputs == "original":
            raise ValueError("refine makes good what predecessors did: it needs calibration.inputs compressed or paired")
        return self

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _parse_cache(cls, value: Any) -> Any:
        if value is None or isinstance(value, KvCache):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("expected a mapping, for example {method: per_token, bits: 4}")
        own = {key: value[key] for key in _OF_ALL_CACHES if key in value}
        options = {key: item for key, item in value.items() if key not in own}
        method = own.get("method", "per_token")
        if method != "per_token" and (own.get("basis", "none") != "none" or own.get("high_share")):
            raise ValueError(f"{method} takes no basis and no high_share; they belong to per_token")
        if own.get("query_share") and own.get("basis") != "pca":
            raise ValueError("query_share mixes moments, so it needs basis: pca")
        if method != "squat" and own.get("metric", "prompt") != "prompt":
            raise ValueError(f"{method} takes no metric; it belongs to squat")
        return KvCache(**own, options=read_config(method, options))

    @field_validator("weights", mode="before")
    @classmethod
    def _parse_rules(cls, value: Any) -> Any:
        rules = [value] if isinstance(value, Mapping) else value
        if not isinstance(rules, list | tuple) or not rules:
            raise ValueError("expected one rule, {method: ..., targets: [...]}, or a list of rules")
        return tuple(rule if isinstance(rule, Rule) else _parse_rule(rule) for rule in rules)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Check a plain dictionary; CompressError names the key, what came and the nearest valid spelling."""
        return _checked(cls, data, "")

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """A shipped recipe by name or a YAML file, with `a.b=value` overrides applied before checking."""
        data = yaml_mapping(read_text(name_or_path), f"recipe {name_or_path}")
        for override in overrides:
            _override(data, override)
        return cls.from_dict(data)

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches a module name, or None; `method: none` also gives None."""
        rule = next((rule for rule in self.weights if rule.matches(name)), None)
        return None if rule is None or rule.method == "none" else rule

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default filled in; `from_dict` accepts it."""
        rules = [rule.resolved() for rule in self.weights]
        return {
            "model": self.model,
            "calibration": self.calibration.model_dump(),
            "weights": rules[0] if len(rules) == 1 else rules,
            "refine": self.refine.model_dump(),
            **({"kv_cache": self.kv_cache.resolved()} if self.kv_cache else {}),
        }

    def rotations(self, hidden_size: int, head_dim: int) -> set[Any]:
        """The different rotations that its rules ask for."""
        return {rule.rotation(hidden_size, head_dim) for rule in self.weights} - {None}

    def digest(self) -> str:
        """Hash of everything that decides the bytes of the result; the default model's name is not among it."""
        data = {key: value for key, value in self.resolved().items() if key != "model"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False)


def yaml_mapping(text: str, origin: str) -> dict[str, Any]:
    """Parse YAML that must be a mapping."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CompressError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise CompressError(f"{origin} must be a mapping of keys, got {type(data).__name__}")
    return data


def _parse_rule(rule: Any) -> Rule:
    if not isinstance(rule, Mapping) or "method" not in rule:
        raise ValueError(f"a rule needs a `method`, one of {', '.join([*methods.names(), 'none'])}; got {rule!r}")
    options = dict(rule)
    method, targets = options.pop("method"), options.pop("targets", ("*_proj",))
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list | tuple) or not targets or not all(isinstance(pattern, str) for pattern in targets):
        raise ValueError(f"targets: expected a pattern or a list of them, for example ['*_proj']; got {targets!r}")
    targets = tuple(targets)
    if method == "none":
        if options:
            raise ValueError(f"method none takes no options, got {', '.join(options)}")
        return Rule(method=method, targets=targets)
    config = _checked(methods.load(method).Config, options, "weights.", extra_keys=("method", "targets"))
    return Rule(method=method, targets=targets, options=config)


def _checked(cls: type[BaseModel], data: Mapping[str, Any], where: str, extra_keys: tuple[str, ...] = ()) -> Any:
    """Validate, and turn pydantic's report into one line about the first problem."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            owner = cls
            for part in location[:-1]:
                owner = owner.model_fields[part].annotation
            section = where + ".".join(location[:-1])
            known = unknown_key(location[-1], [*owner.model_fields, *extra_keys])
            raise CompressError(": ".join(filter(None, ["recipe", section.rstrip("."), known]))) from error
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, CompressError):
            raise cause from error
        came = f", got {first['input']!r}" if location and first["type"] != "missing" else ""
        message = first["msg"].removeprefix("Value error, ")
        name = (where + ".".join(location)).rstrip(".")  # a rule between keys has none
        raise CompressError(": ".join(filter(None, ["recipe", name, message])) + ("" if cause else came)) from error


def unknown_key(key: str, available: list[str]) -> str:
    return unknown("key", key, available)


def _override(data: dict[str, Any], override: str) -> None:
    """Apply `weights.ratio=0.3`; a list of rules is addressed by number, `weights.0.ratio=0.3`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise CompressError(f"--set expects key=value, for example weights.ratio=0.3, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        hint = f"""; quote it: --set '{path}="{text}"'""" if text[:1] in "*&!%@" else ""
        raise CompressError(f"--set {override}: the value is not valid YAML{hint}") from error
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise CompressError(f"--set {override}: {part!r} is not one of the {len(node)} rules, counted from 0")
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise CompressError(f"--set {override}: {part!r} is a value, it has no keys")
    if isinstance(node, list):
        raise CompressError(f"--set {override}: weights is a list of rules here; write weights.0.{last}=...")
    node[last] = value
    if last in _SIZES and parents[:1] == ["weights"]:  # one size stands for the others; `ratio` yields by itself
        for other in _SIZES - {last, "ratio"}:
            node.pop(other, None)
