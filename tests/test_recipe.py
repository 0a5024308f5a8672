"""Recipes: every shipped one is valid, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress import methods
from compress.errors import CompressError
from compress.recipe import Recipe, shipped


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_round_trip(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.from_dict(recipe.resolved()) == recipe
    assert Recipe.from_dict(recipe.resolved()).digest() == recipe.digest()


def test_every_method_has_a_recipe() -> None:
    used = {rule.method for name in shipped() for rule in Recipe.load(name).weights}
    assert used == set(methods.names())


def test_overrides() -> None:
    recipe = Recipe.load("cospadi-20", ["weights.ratio=0.3", "calibration.samples=4"])
    assert recipe.weights[0].options.ratio == 0.3 and recipe.calibration.samples == 4
    assert recipe.digest() != Recipe.load("cospadi-20").digest()


def test_one_size_stands_for_the_others(tmp_path: Path) -> None:
    """The recipe.yaml of a run with a target has both keys."""
    (tmp_path / "r.yaml").write_text(Recipe.load("cospadi-75", ["weights.target_size=1MB"]).to_yaml())
    for override, key, value in (("ratio=0.5", "ratio", 0.5), ("target_bits=3", "target_bits", 3)):
        options = Recipe.load(tmp_path / "r.yaml", [f"weights.{override}"]).weights[0].options
        assert options.target_size is None and getattr(options, key) == value
    assert Recipe.load(tmp_path / "r.yaml", ["calibration.seed=1"]).weights[0].options.target_size == 10**6


def test_first_rule_wins_and_none_keeps() -> None:
    rules = [{"method": "none", "targets": "*.0.*"}, {"method": "svd_llm", "ratio": 0.4}]
    recipe = Recipe.from_dict({"weights": rules})
    assert recipe.rule_for("model.layers.0.mlp.up_proj") is None
    assert recipe.rule_for("model.layers.1.mlp.up_proj").method == "svd_llm"
    assert recipe.rule_for("lm_head") is None


WRONG = {
    "unknown method": ({"weights": {"method": "cospadii"}}, "did you mean 'cospadi'"),
    "unknown option": (
        {"weights": {"method": "cospadi", "ratoi": 0.2}},
        "recipe: weights: unknown key 'ratoi'; did you mean 'ratio'",
    ),
    "unknown section": ({"wieghts": {}, "weights": {"method": "cospadi"}}, "unknown key 'wieghts'; did you mean 'weights'"),
    "nested key": (
        {"calibration": {"sample": 1}, "weights": {"method": "cospadi"}},
        "recipe: calibration: unknown key 'sample'; did you mean 'samples'",
    ),
    "ratio": ({"weights": {"method": "cospadi", "ratio": 1.5}}, r"weights\.ratio: .*less than 1, got 1\.5"),
    "no weights": ({}, "weights"),
    "no method": ({"weights": {"ratio": 0.2}}, "needs a `method`"),
    "empty list": ({"weights": []}, "expected one rule"),
    "options that clash": (
        {"weights": {"method": "resq", "target_bits": 4}},
        "^recipe: weights: ratio, target_size and target_bits need allocation: search, as resq-75 has it; else bits decides",
    ),
    "sections that clash": (
        {"calibration": {"inputs": "original"}, "refine": {"epochs": 1}, "weights": {"method": "cospadi"}},
        "^recipe: refine makes good what predecessors did",
    ),
    "options of none": ({"weights": {"method": "none", "ratio": 0.2}}, "takes no options"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named_on_one_line(case: str) -> None:
    data, message = WRONG[case]
    with pytest.raises(CompressError, match=message) as caught:
        Recipe.from_dict(data)
    assert "\n" not in str(caught.value)


OVERRIDES = {
    "weights": "--set expects key=value",
    "weights.ratio.x=1": "--set",
    "=3": "--set",
    "weights.targets=5": r"targets: expected a pattern or a list of them, for example \['\*_proj'\]; got 5",
    "weights.targets=null": "targets: expected a pattern .* got None",
    "weights.targets=[5]": "targets: expected a pattern",
    "weights.targets=[]": "targets: expected a pattern",
    "weights.method=5": "unknown method 5; available: cospadi",
    "weights.method=null": "unknown method None",
    "weights.method=[1]": "unknown method",
    "weights.seed=-1": r"weights\.seed: .* got -1",
    "weights.damping=.inf": r"weights\.damping: .*finite",
    "weights.damping=.nan": r"weights\.damping: ",
    "weights=null": "expected one rule",
    "calibration=5": "recipe: calibration: ",
    "calibration.seed=100000000000000000000000": r"calibration\.seed: .*less than or equal to 9223372036854775807",
    "calibration.length=1000000000000": r"calibration\.length: .*less than or equal to",
    "calibration.dataset=5": r"calibration\.dataset: .*valid string",
    "kv_cache.method=5": "unknown KV cache method 5",
    "kv_cache={5: 3}": "KV cache: 5: ",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_bad_overrides_are_named_on_one_line(override: str) -> None:
    with pytest.raises(CompressError, match=OVERRIDES[override]) as caught:
        Recipe.load("cospadi-20", [override])
    assert "\n" not in str(caught.value)


def test_a_recipe_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("weights: {method: cospadi} # caf\xe9".encode("latin1"))
    with pytest.raises(CompressError, match="not UTF-8 text"):
        Recipe.load(tmp_path / "r.yaml")


def test_unknown_recipe_suggests() -> None:
    with pytest.raises(CompressError, match="did you mean 'cospadi-20'"):
        Recipe.load("cospadi20")
