"""Recipes: every shipped one is valid, and every mistake is named."""

from __future__ import annotations

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


def test_first_rule_wins_and_none_keeps() -> None:
    rules = [{"method": "none", "targets": "*.0.*"}, {"method": "svd_llm", "ratio": 0.4}]
    recipe = Recipe.from_dict({"weights": rules})
    assert recipe.rule_for("model.layers.0.mlp.up_proj") is None
    assert recipe.rule_for("model.layers.1.mlp.up_proj").method == "svd_llm"
    assert recipe.rule_for("lm_head") is None


WRONG = {
    "unknown method": ({"weights": {"method": "cospadii"}}, "did you mean 'cospadi'"),
    "unknown option": ({"weights": {"method": "cospadi", "ratoi": 0.2}}, "unknown key 'ratoi'; did you mean 'ratio'"),
    "unknown section": ({"wieghts": {}, "weights": {"method": "cospadi"}}, "unknown key 'wieghts'; did you mean 'weights'"),
    "nested key": ({"calibration": {"sample": 1}, "weights": {"method": "cospadi"}}, "did you mean 'samples'"),
    "ratio": ({"weights": {"method": "cospadi", "ratio": 1.5}}, r"weights\.ratio: .*less than 1, got 1\.5"),
    "no weights": ({}, "weights"),
    "no method": ({"weights": {"ratio": 0.2}}, "needs a `method`"),
    "empty list": ({"weights": []}, "expected one rule"),
    "options of none": ({"weights": {"method": "none", "ratio": 0.2}}, "takes no options"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named_on_one_line(case: str) -> None:
    data, message = WRONG[case]
    with pytest.raises(CompressError, match=message) as caught:
        Recipe.from_dict(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["weights", "weights.ratio.x=1", "=3"])
def test_bad_overrides(override: str) -> None:
    with pytest.raises(CompressError, match="--set"):
        Recipe.load("cospadi-20", [override])


def test_unknown_recipe_suggests() -> None:
    with pytest.raises(CompressError, match="did you mean 'cospadi-20'"):
        Recipe.load("cospadi20")
