"""Refinement: the block's error falls, supports and codes stay, and a run that was cut off gives the same bytes."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import save_tiny, tiny_model, tiny_recipe, tiny_tokenizer

from compress.blockwise import Silent, filled_layer, start_runner
from compress.errors import CompressError
from compress.kernels.hadamard import hadamard
from compress.model import materialise
from compress.prepare import prepare
from compress.recipe import Recipe
from compress.refine import Refined, _in_place_of_linears, refine_block
from compress.run import _tokens, run
from compress.tensorfile import read_header

FORMS = {
    "pruned": {"dictionary": "identity", "ratio": 0.4},
    "learned": {"ratio": 0.3},
    "learned integers": {"ratio": 0.5, "value_bits": 4, "dictionary_bits": 8},
    "both": {"dictionary": "identity+learned", "ratio": 0.3},
    "integers": {"method": "gptq", "bits": 3, "group_size": 16},
    "low rank": {"method": "svd_llm", "ratio": 0.4},
}


def refined(weights: dict, epochs: int = 16, inputs: str = "paired") -> Recipe:
    data = tiny_recipe(**weights)
    if weights.get("method", "cospadi") == "gptq":
        data["weights"].pop("ratio")
    data["calibration"]["inputs"] = inputs
    return Recipe.from_dict({**data, "refine": {"epochs": epochs, "rate": 0.003}})


class Notes(Silent):
    """Keeps the errors that a run tells."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []

    def note(self, text: str) -> None:
        if "error of its output" in text:
            before, after = (float(word.strip(",")) for word in text.split() if "." in word or "inf" in word)
            self.pairs.append((before, after))
            assert ("kept" in text) == (not after < before)


def packed(path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in read_header(path / "model.safetensors").items()}


@pytest.mark.parametrize("form", FORMS)
def test_block_errors_fall_and_codes_stay(tmp_path, form):
    model, notes = save_tiny(tmp_path / "m"), Notes()
    plain, told = (tmp_path / name for name in ("plain", "told"))
    run(model, refined(FORMS[form], epochs=0), plain)
    report = run(model, refined(FORMS[form]), told, progress=notes)
    assert len(notes.pairs) == 3
    assert all(after < before for before, after in notes.pairs), notes.pairs  # 1 to 35 % lower
    before, after = packed(plain), packed(told)
    assert before.keys() == after.keys()
    first = {key for key in before if ".layers.0." in key}  # later blocks see other inputs
    moved = {key.rpartition(".")[2] for key in first if not torch.equal(before[key], after[key])}
    assert moved == {
        "pruned": {"values"}, "learned": {"values", "dictionary"}, "learned integers": {"scale", "dictionary_scale"},
        "both": {"values", "dictionary"}, "integers": {"low_scale"}, "low rank": {"down", "up"},
    }[form]  # fmt: skip
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert all(0 < module.error < 1 for module in report.modules)


def test_rotated_inputs_that_are_rounded(tmp_path):
    """Gradients pass through the Hadamard transform of a weight and the rounding of its inputs."""
    model, notes = save_tiny(tmp_path / "m"), Notes()
    weights = {"method": "resq", "activation_bits": 8}
    data = {**tiny_recipe(), "weights": weights, "refine": {"epochs": 16, "rate": 0.003}}
    run(model, Recipe.from_dict(data), tmp_path / "o", progress=notes)
    assert all(after < before for before, after in notes.pairs), notes.pairs


def test_weights_decide_which_tokens_are_served(tmp_path):
    """Of two refinements each is the better one where its weights are, and one whose weights are alike is as without."""
    recipe = refined(FORMS["integers"], epochs=16)
    run(save_tiny(tmp_path / "m"), refined(FORMS["integers"], epochs=0), tmp_path / "plain")
    held = packed(tmp_path / "plain")
    prepared = prepare(tmp_path / "m", recipe, "cpu")
    runner = start_runner(prepared, _tokens(prepared, None))
    materialise(prepared.model, prepared.source, "model.layers.0.", torch.float32, prepared.device)
    early = torch.linspace(2, 0, 64).expand(8, 64)
    outputs = {}
    for name, weights in {"none": None, "alike": torch.ones(8, 64), "early": early, "late": 2 - early}.items():
        layers = {}
        for job in prepared.plan.by_block[0]:
            mine = {key.removeprefix(f"{job.name}."): value for key, value in held.items() if key.startswith(job.name)}
            layers[job.name] = filled_layer(job.spec, mine, prepared.device)
        assert refine_block(runner, 0, layers, recipe.refine, 0, weights).better
        with _in_place_of_linears(prepared.model, layers):
            outputs[name] = torch.cat(runner.outputs(0))
    errors = {name: (output - torch.cat(runner.outputs(0))).square().sum(dim=-1) for name, output in outputs.items()}
    assert torch.equal(errors["none"], errors["alike"])
    assert float((errors["early"] * early).sum()) < 0.99 * float((errors["late"] * early).sum())
    assert float((errors["late"] * (2 - early)).sum()) < 0.99 * float((errors["early"] * (2 - early)).sum())


def test_a_recipe_that_weighs_tokens_weighs_them_here_too(tmp_path, monkeypatch):
    data = refined(FORMS["integers"], epochs=1).resolved()
    data["calibration"]["token_weighting"] = 0.7
    data["weights"]["targets"] = ["*.0.*", "*.2.mlp.*"]
    told = []

    def refuses(runner, index, layers, options, seed, weights):
        told.append((index, weights.shape, float(weights.mean()), float(weights.std()) > 0.1))
        return Refined(1.0, 1.0, False)

    monkeypatch.setattr("compress.blockwise.refine_block", refuses)
    run(save_tiny(tmp_path / "m"), Recipe.from_dict(data), tmp_path / "o")
    assert told == [(index, (8, 64), pytest.approx(1), True) for index in (0, 2)]


def test_same_bytes_after_an_interruption(tmp_path, monkeypatch):
    model, recipe = save_tiny(tmp_path / "m"), refined(FORMS["pruned"])
    run(model, recipe, tmp_path / "whole")
    calls = []

    def dies(runner, index, *args):
        calls.append(index)
        if index == 1 and calls.count(1) == 1:
            raise KeyboardInterrupt
        return kept(runner, index, *args)

    import compress.blockwise as blockwise

    kept = blockwise.refine_block
    monkeypatch.setattr(blockwise, "refine_block", dies)
    with pytest.raises(KeyboardInterrupt):
        run(model, recipe, tmp_path / "again")
    run(model, recipe, tmp_path / "again")
    assert calls == [0, 1, 1, 2]
    whole, again = packed(tmp_path / "whole"), packed(tmp_path / "again")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_block_that_gets_worse_keeps_what_it_had(tmp_path):
    model, notes = save_tiny(tmp_path / "m"), Notes()
    data = refined(FORMS["pruned"]).resolved()
    data["refine"]["rate"] = 1.0  # steps as large as the weights themselves
    run(model, refined(FORMS["pruned"], epochs=0), tmp_path / "plain")
    run(model, Recipe.from_dict(data), tmp_path / "wild", progress=notes)
    assert all(after > before for before, after in notes.pairs), notes.pairs
    plain, wild = packed(tmp_path / "plain"), packed(tmp_path / "wild")
    assert all(torch.equal(plain[key], wild[key]) for key in plain)


@pytest.mark.parametrize("wrong", ["nan", "inf"])
def test_a_block_that_diverges_keeps_what_it_had(tmp_path, monkeypatch, wrong):
    import compress.refine as refine

    def diverge(runner, index, layers, *rest):
        for layer in layers.values():
            layer.values.data[0, 0] = float(wrong)

    monkeypatch.setattr(refine, "_descend", diverge)
    model, notes = save_tiny(tmp_path / "m"), Notes()
    run(model, refined(FORMS["pruned"], epochs=0), tmp_path / "plain")
    run(model, refined(FORMS["pruned"]), tmp_path / "wild", progress=notes)
    assert all(after == float("inf") for _, after in notes.pairs)
    plain, wild = packed(tmp_path / "plain"), packed(tmp_path / "wild")
    assert all(torch.equal(plain[key], wild[key]) for key in plain)


def test_a_block_that_adds_nothing(tmp_path):
    """As in models that were made deeper by blocks of zeros."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    run(tmp_path / "m", refined(FORMS["pruned"], inputs="compressed"), tmp_path / "o")


def test_padded_documents(tmp_path):
    """Short documents are padded; what stands there must not count."""
    model, notes = save_tiny(tmp_path / "m"), Notes()
    data = refined(FORMS["pruned"]).resolved()
    data["calibration"]["layout"] = "documents"
    data["refine"]["rate"] = 0.001
    texts = ["short one", "a longer one that goes on for a while", "x " * 30] * 4
    run(model, Recipe.from_dict(data), tmp_path / "o", texts=texts, progress=notes)
    assert all(after < before for before, after in notes.pairs), notes.pairs


def test_original_inputs_are_refused():
    with pytest.raises(CompressError, match="inputs compressed or paired"):
        refined(FORMS["pruned"], inputs="original")


def test_hadamard_passes_gradients():
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, (x, 0))
