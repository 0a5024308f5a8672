"""The second tier: SmolLM2-135M-Instruct itself. Fails, not skips, when the model cannot be had."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.evaluate.compare import compare
from compress.evaluate.tasks import run_tasks
from compress.recipe import Recipe
from compress.run import run
from helpers import DATA
from smollm2 import smollm2

# Two blocks in the middle, 8k tokens: enough to rank methods, a minute instead of ten.
TARGETS = ["model.layers.1[01].*_proj"]


def wikitext(split: str) -> str:
    """The local copy of WikiText-2 when there is one, else its name on the hub."""
    files = {"train": "wiki.train.first1MB.nonblank.raw", "test": "wiki.test.raw"}
    file = DATA / "wikitext-2-raw" / files[split]
    return str(file) if file.is_file() else "wikitext2"


@pytest.fixture(scope="session")
def model_path() -> Path:
    return smollm2()


@pytest.fixture(scope="session")
def original(model_path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def compressed_paths(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name in ("cospadi-20-learned", "svd-llm-20", "cospadi-40", "gptq-w4", "rtn-w4", "resq"):
        given = [f"weights.targets={TARGETS}", f"calibration.dataset={wikitext('train')}", "calibration.samples=8"]
        if name == "cospadi-40":
            given += ["weights.allocation=uniform", "weights.dictionary=identity"]  # trials take minutes
        recipe = Recipe.load(name, given)
        paths[name] = tmp_path_factory.mktemp("smollm2") / name
        run(model_path, recipe, paths[name])
    return paths


def test_original_perplexity_is_the_known_one(original: torch.nn.Module, model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    result = compare(original, tokenizer, dataset=wikitext("test"), length=1024, windows=4)
    assert result["compressed"]["quality"]["perplexity"] == pytest.approx(26.2, abs=6)


def test_cospadi_beats_svd_at_equal_bytes(
    original: torch.nn.Module, model_path: Path, compressed_paths: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    kl = {}
    for name, path in compressed_paths.items():
        model = compress.load(path, dtype=torch.float32)
        result = compare(model, tokenizer, original, dataset=wikitext("test"), length=512, windows=3)
        kl[name] = result["compressed"]["quality"]["kl"]
    assert 0 < kl["cospadi-20-learned"] < 0.7 * kl["svd-llm-20"]
    assert kl["cospadi-40"] < kl["cospadi-20-learned"]  # unit vectors at 40 % beat learned ones at 20 %


def test_gptq_beats_rounding_at_equal_bytes(
    original: torch.nn.Module, model_path: Path, compressed_paths: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    kl = {}
    for name in ("gptq-w4", "rtn-w4"):
        model = compress.load(compressed_paths[name], dtype=torch.float32)
        result = compare(model, tokenizer, original, dataset=wikitext("test"), length=512, windows=3)
        kl[name] = result["compressed"]["quality"]["kl"]
    assert 0 < kl["gptq-w4"] < 0.7 * kl["rtn-w4"]


def test_packed_integers_and_their_simulation_agree(model_path: Path, compressed_paths: dict[str, Path]) -> None:
    """4-bit weights and inputs on the rotated model: integer products against rounded floats, for the inputs that each layer
    really gets (one code that falls the other way would spread to all later layers), and greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    inputs = tokenizer("A list in Python is a collection of", return_tensors="pt")
    packed = compress.load(compressed_paths["resq"], dtype=torch.float32)
    simulated = compress.load(compressed_paths["resq"], dtype=torch.float32)
    count = 0

    def agree(layer: torch.nn.Module, args: tuple, output: torch.Tensor, linear: torch.nn.Linear) -> None:
        nonlocal count
        count += 1
        expected = linear(args[0])
        assert (output - expected).norm() < 1e-3 * expected.norm()

    layers = [(n, layer) for n, layer in simulated.named_modules() if getattr(layer, "format", "") == "mixed_precision"]
    for name, layer in layers:
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = torch.nn.Parameter(layer.dense_weight())
        linear.register_forward_pre_hook(lambda module, args, layer=layer: (layer.seen_input(layer.spec, args[0]),))
        simulated.set_submodule(name, linear)
        packed.get_submodule(name).register_forward_hook(partial(agree, linear=linear))
    with torch.inference_mode():
        packed(**inputs)
    assert count == len(layers) == 14
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(packed.generate(**inputs, **options), simulated.generate(**inputs, **options))


def test_generation_survives_a_round_trip(model_path: Path, compressed_paths: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(compressed_paths["cospadi-20-learned"])
    first = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again").generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(first, second)
    assert "Paris" in tokenizer.decode(first[0])


def test_lm_eval_tasks_run_on_the_compressed_model(model_path: Path, compressed_paths: dict[str, Path]) -> None:
    model = compress.load(compressed_paths["cospadi-20-learned"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data = DATA if (DATA / "piqa").is_dir() else None
    numbers = run_tasks(model, tokenizer, ["piqa", "arc_easy"], data=data, limit=12)
    assert set(numbers) == {"piqa", "arc_easy"}
    assert all(0 < numbers[task].numbers["acc"] <= 1 for task in numbers)
