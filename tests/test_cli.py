"""The command line as a user meets it: in a process of its own, messages on stderr, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import save_tiny, tiny_recipe

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "160"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-c", "from compress.cli import main; main()", *map(str, arguments)]


def compress(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(json.dumps(tiny_recipe()))
    return path


def test_the_main_job(tiny_llama: Path, recipe_file: Path, tmp_path: Path) -> None:
    dry = compress("model", tiny_llama, "--recipe", recipe_file, "--dry-run")
    assert dry.returncode == 0 and "3 x q_proj" in dry.stdout and "memory, about" in dry.stdout
    assert list(tmp_path.iterdir()) == []
    done = compress("model", tiny_llama, "--recipe", recipe_file, "-o", tmp_path / "out", "--set", "weights.ratio=0.3")
    assert done.returncode == 0, done.stderr
    assert "512 tokens" in done.stderr
    assert "peak memory" in done.stdout and "worst output error" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"config.json", "recipe.yaml", "report.json", "README.md"}

    shown = compress("inspect", tmp_path / "out")
    assert shown.returncode == 0 and "model.layers.2.mlp.down_proj" in shown.stdout
    report = json.loads(compress("inspect", tmp_path / "out", "--json").stdout)
    assert report["totals"]["measured_ratio"] >= 0.3

    evaluated = compress(
        "evaluate", tmp_path / "out", "--against", tiny_llama, "--dataset", "python-docs", "--length", 64, "--windows", 2,
        "-o", tmp_path / "figures.json",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["compressed"]["quality"]["kl"] > 0 and "perplexity" in evaluated.stdout

    exported = compress("export", tmp_path / "out", "-o", tmp_path / "dense")
    assert exported.returncode == 0 and (tmp_path / "dense" / "model.safetensors").is_file()


def test_recipes_verbs(recipe_file: Path) -> None:
    assert "cospadi-20-faithful" in compress("recipes", "list").stdout
    assert "damping" in compress("recipes", "show", "svd-llm-20").stdout
    assert compress("recipes", "check", recipe_file).returncode == 0


def with_nan(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def not_causal(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))


def huge(path: Path) -> None:
    """A checkpoint that no disk here can hold twice: 8 TB in a sparse file, under a name from old checkpoints."""
    end = 1 << 43
    header = {"model.rotary_emb.inv_freq": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}}
    for name, tensor in load_file(path / "model.safetensors").items():
        start, end = end, end + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


MISTAKES = {
    "unknown recipe": (["--recipe", "cospadi-2"], "did you mean 'cospadi-20'"),
    "unknown key": (["--set", "weights.ratoi=1"], "did you mean 'ratio'"),
    "no such target": (
        ["--set", "weights.targets=['*_porj']"],
        r"no linear layer matches target '\*_porj'; did you mean '\*[a-z]_proj'",
    ),
    "embedding": (["--set", "weights.targets=['*embed_tokens']"], "only nn.Linear"),
    "tied head": (["--set", "weights.targets=['lm_head']"], "lm_head shares its weight"),
    "ratio": (["--set", "weights.ratio=1.2"], "less than 1, got 1.2"),
    "unreachable": (["--set", "weights.ratio=0.97"], r"model\.layers\.0\.\S+: ratio 0\.97 leaves no room"),
    "missing data": (["--set", "calibration.dataset=none.txt"], "none.txt does not exist"),
    "little data": (["--set", "calibration.samples=99999999"], "more; lower calibration.samples"),
    "no hub": (["--set", "calibration.dataset=wikitext2"], "python-docs or a local"),
    "no output": (["-o", ""], "no output|-o"),
    "unknown option": (["--wat"], "No such option"),
    "device": (["--device", "qpu"], "unknown device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_cost_one_line(mistake: str, tiny_llama: Path, recipe_file: Path, tmp_path: Path) -> None:
    extra, message = MISTAKES[mistake]
    recipe = [] if "--recipe" in extra else ["--recipe", recipe_file]
    output = [] if "-o" in extra else ["-o", tmp_path / "out"]
    if mistake == "no output":
        extra = []
    expect_failure(compress("model", tiny_llama, *recipe, *output, *extra), message)
    assert list(tmp_path.iterdir()) == []


MODELS = {
    "missing": (None, "does not exist"),
    "nan": (with_nan, r"up_proj\.weight hold NaN"),
    "not causal": (not_causal, "not a causal language model"),
    "no space": (huge, "no space left"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "holds no model.safetensors"),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("tokenizer*")], "no usable tokenizer"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_bad_models_cost_one_line(kind: str, recipe_file: Path, tmp_path: Path) -> None:
    damage, message = MODELS[kind]
    model = tmp_path / "models" / "tiny"
    (tmp_path / "models").mkdir()
    (tmp_path / "work").mkdir()
    if damage:
        save_tiny(model)
        damage(model)
    expect_failure(compress("model", model, "--recipe", recipe_file, "-o", tmp_path / "work" / "out"), message)
    assert list((tmp_path / "work").iterdir()) == []


def test_compressed_models_and_existing_outputs_are_refused(
    tiny_compressed: Path, tiny_llama: Path, recipe_file: Path
) -> None:
    elsewhere = tiny_compressed.parent / "again"
    expect_failure(compress("model", tiny_compressed, "--recipe", recipe_file, "-o", elsewhere), "already compressed")
    expect_failure(compress("model", tiny_llama, "--recipe", recipe_file, "-o", tiny_compressed), "already exists")
    expect_failure(compress("inspect", tiny_llama), "not a compressed checkpoint")
    assert not elsewhere.exists()


def test_ctrl_c(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text(json.dumps(tiny_recipe(iterations=100_000)))
    arguments = command("model", tiny_llama, "--recipe", tmp_path / "slow.yaml", "-o", tmp_path / "out")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not (tmp_path / ".out.partial" / "run.json").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "interrupted" in error.splitlines()[-1] and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slow.yaml"]


def expect_failure(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("compress: ")]
    assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0], done.stderr
    assert re.search(message, lines[0]), lines[0]
