"""The command line as a user meets it: in a process of its own, messages on stderr, exit codes."""

from __future__ import annotations

import errno
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

from compress.console import BarProgress
from compress.version import __version__
from helpers import save_tiny, task_files, tiny_recipe

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "160"}


def test_a_pipe_hears_every_fifth(capsys: pytest.CaptureFixture) -> None:
    """Of two stages, one after the other, whose steps are no multiple of five."""
    with BarProgress() as progress:
        for total, what in ((12, "matrices tried"), (3, "windows")):
            step = progress.count(total, what)
            for _ in range(total):
                step()
    lines = [f"{done} of 12 matrices tried" for done in (3, 5, 8, 10, 12)] + [f"{done} of 3 windows" for done in (1, 2, 3)]
    assert capsys.readouterr().err.splitlines() == lines


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
    (tmp_path / "out").mkdir()  # an empty directory will do
    (tmp_path / "link").symlink_to("out")
    refused = compress("model", tiny_llama, "--recipe", recipe_file, "-o", tmp_path / "link")
    expect_failure(refused, "link already exists; choose another -o")
    (tmp_path / "link").unlink()
    done = compress("model", tiny_llama, "--recipe", recipe_file, "-o", tmp_path / "out", "--set", "weights.ratio=0.3")
    assert done.returncode == 0, done.stderr
    told = [f"{count} of 21 matrices compressed" for count in (5, 9, 13, 17, 21)]
    assert done.stderr.splitlines() == told, "a pipe gets lines in place of a bar, and nothing went wrong"
    assert "512 tokens" in done.stdout and "tokens of the text were not drawn" in done.stdout
    assert re.search(r"6 x 64 -> 64 \(q_proj, o_proj\): sparse_dictionary, K \d+, s \d+, K/s \d\.\d\d", done.stdout)
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
    assert evaluated.stderr.splitlines() == ["1 of 2 windows", "2 of 2 windows"], "a pipe is told where it is"
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (tmp_path / "out", tiny_llama)]
    for side, size in zip(("compressed", "original"), sizes, strict=True):
        assert 0 < size - figures[side]["checkpoint_bytes"] < 20_000  # without the headers
    assert figures["difference"]["quality"]["perplexity_stderr"] > 0
    assert figures["protocol"]["column"] == "text" and figures["environment"]["versions"]["transformers"]

    (tmp_path / "dense").mkdir()
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
    "missing data of a dry run": (["--set", "calibration.dataset=none.txt", "--dry-run"], "none.txt does not exist"),
    "little data": (["--set", "calibration.samples=99999999"], "more; lower calibration.samples"),
    "no hub": (["--set", "calibration.dataset=wikitext2"], "python-docs or a local"),
    "no output": (["-o", ""], "no output|-o"),
    "unknown option": (["--wat"], "No such option"),
    "device": (["--device", "qpu"], "unknown device"),
    "targets": (["--set", "weights.targets=5"], "targets: expected a pattern"),
    "method": (["--set", "weights.method=5"], "unknown method 5"),
    "trials": (["--trials-from", "nowhere"], "nowhere does not exist; give --trials-from a checkpoint made by a search"),
    "trials of a dry run": (["--trials-from", "nowhere", "--dry-run"], "nowhere does not exist; give --trials-from"),
    "seed": (["--set", "calibration.seed=100000000000000000000000"], "calibration.seed: .* less than or equal to"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_cost_one_line(
    mistake: str, tiny_llama: Path, recipe_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Most in this process: each would pay the imports otherwise."""
    extra, message = MISTAKES[mistake]
    recipe = [] if "--recipe" in extra else ["--recipe", recipe_file]
    output = [] if "-o" in extra else ["-o", tmp_path / "out"]
    if mistake == "no output":
        extra = []
    arguments = ["model", tiny_llama, *recipe, *output, *extra]
    alone = mistake in ("unknown recipe", "no hub", "unknown option")
    expect_failure(compress(*arguments) if alone else run_here(monkeypatch, capsys, *arguments), message)
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
def test_bad_models_cost_one_line(kind: str, recipe_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    damage, message = MODELS[kind]
    model = tmp_path / "models" / "tiny"
    (tmp_path / "models").mkdir()
    (tmp_path / "work").mkdir()
    if damage:
        save_tiny(model)
        damage(model)
    done = run_here(monkeypatch, capsys, "model", model, "--recipe", recipe_file, "-o", tmp_path / "work" / "out")
    expect_failure(done, message)
    assert list((tmp_path / "work").iterdir()) == []


def test_compressed_models_and_existing_outputs_are_refused(
    tiny_compressed: Path, tiny_llama: Path, recipe_file: Path
) -> None:
    elsewhere = tiny_compressed.parent / "again"
    expect_failure(compress("model", tiny_compressed, "--recipe", recipe_file, "-o", elsewhere), "already compressed")
    expect_failure(compress("model", tiny_llama, "--recipe", recipe_file, "-o", tiny_compressed), "already exists")
    expect_failure(compress("inspect", tiny_llama), "not a compressed checkpoint")
    assert not elsewhere.exists()


def evaluate_mistakes(model: Path, folder: Path) -> dict[str, tuple[list, str]]:
    """Arguments behind `evaluate MODEL --dataset python-docs --length 64 --windows 1`, and what the one line says."""
    data = task_files(folder / "data")
    (folder / "rows.jsonl").write_text('{"body": "a"}')
    (folder / "null.jsonl").write_text('{"text": null}')
    other = save_tiny(folder / "other", vocab_size=300)
    tokens = save_tiny(folder / "tokens")
    tokenizer = json.loads((tokens / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tokens / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {
        "device": (["--device", "qpu"], "unknown device 'qpu'"),
        "no gpu": (["--device", "cuda"], "torch finds no GPU here"),
        "vocabulary": (["--against", other], "vocabulary of 300 tokens"),
        "tokenizer": (["--against", tokens], "another vocabulary than"),
        "column": (["--dataset", folder / "rows.jsonl"], r"the columns are body \(give --column\)"),
        "null": (["--dataset", folder / "null.jsonl"], "holds no text"),
        "nothing": (["--dataset", "none"], "nothing to measure"),
        "folder": (["-o", folder / "no" / "f.json"], "no does not exist; make it first"),
        "directory": (["-o", folder], "is a directory; give -o a file"),
        "no file": (["--dataset", folder / "no.txt"], r"no\.txt does not exist"),
        "no tasks": (["--limit", 3], "--limit is an option of tasks: give --tasks"),
        "no kernels": (["--device", "meta"], "there are no kernels for it; use auto, cpu or cuda"),
        "task": (["--tasks", "piqua"], "unknown task 'piqua'; did you mean 'piqa'"),
        "task data": (["--tasks", "piqa", "--data", folder / "no"], "is no directory"),
        "split": (["--tasks", "gsm8k", "--data", data], "gsm8k shows 5 examples of its train split"),
        "tag": (["--tasks", "ai2_arc", "--data", data], r"arc_challenge holds no test\.jsonl"),
        "length": (["--length", "1"], "greater than or equal to 2"),
    }


def test_mistakes_of_evaluate_cost_one_line(tiny_llama: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """In this process: each would pay the imports otherwise. Models must not be read for what can be seen before."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for kind, (extra, message) in evaluate_mistakes(tiny_llama, tmp_path).items():
        arguments = ["evaluate", tiny_llama, "--dataset", "python-docs", "--length", 64, "--windows", 1, *extra]
        if kind in (
            "device",
            "no gpu",
            "nothing",
            "folder",
            "directory",
            "task",
            "task data",
            "split",
            "tag",
            "no file",
            "no tasks",
            "no kernels",
        ):
            monkeypatch.setattr("compress.model.load_for_evaluation", lambda *_: pytest.fail("a model was read"))
        done = run_here(monkeypatch, capsys, *arguments)
        expect_failure(done, message)
        monkeypatch.undo()
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize("broken", ["/dev/full", "ascii"])
def test_figures_outlive_a_screen_that_fails(broken: str, tiny_llama: Path, tmp_path: Path) -> None:
    """A full disk behind stdout; a terminal without the sign for plus or minus."""
    file = tmp_path / "text.txt"
    file.write_text("Some text. " * 40)
    arguments = command("evaluate", tiny_llama, "--dataset", file, "--length", 32, "--windows", 2, "-o", tmp_path / "f.json")
    environment = ENVIRONMENT | ({"PYTHONIOENCODING": "ascii"} if broken == "ascii" else {})
    with open(tmp_path / "out" if broken == "ascii" else broken, "w") as screen:
        done = subprocess.run(arguments, stdout=screen, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert done.returncode == (0 if broken == "ascii" else 2) and "Traceback" not in done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["compressed"]["quality"]["perplexity"] > 0
    assert figures["protocol"]["split"] is None and figures["protocol"]["config"] is None, "a file has none"


def test_tasks_alone_need_no_text_and_no_hub(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", "piqa", "--data", task_files(tmp_path / "data"), "--dataset", "none", "--limit", 2]
    done = compress("evaluate", tiny_llama, "--against", tiny_llama, *arguments, "-o", tmp_path / "f.json")
    assert done.returncode == 0, done.stderr
    assert "piqa acc" in done.stdout and "perplexity" not in done.stdout
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["difference"]["tasks"]["piqa"] == {"acc": 0, "acc_stderr": 0, "acc_norm": 0, "acc_norm_stderr": 0}
    assert figures["protocol"]["limit"] == 2 and "dataset" not in figures["protocol"]


def overflowing(path: Path) -> None:
    """Finite weights whose products are not: the first layer to show it is block 1's up_proj."""
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_activations_that_are_not_finite_name_the_layer(recipe_file: Path, tmp_path: Path) -> None:
    overflowing(save_tiny(tmp_path / "model"))
    (tmp_path / "work").mkdir()
    done = compress("model", tmp_path / "model", "--recipe", recipe_file, "-o", tmp_path / "work" / "out")
    # which of the two comes first depends on the order in which a machine adds up a row
    overflow = (
        r"first in the output of model\.layers\.1\.mlp\.up_proj|inputs of model\.layers\.1\.mlp\.down_proj are too large"
    )
    expect_failure(done, overflow)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("block", [0, 2])
def test_a_full_disk_names_what_is_kept(
    block: int, tiny_llama: Path, recipe_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    import compress.staging as staging

    write = staging.write_file

    def full(path: Path, tensors: object) -> None:
        if path.name == f"block-{block:05d}.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, tensors)

    monkeypatch.setattr(staging, "write_file", full)
    done = run_here(monkeypatch, capsys, "model", tiny_llama, "--recipe", recipe_file, "-o", tmp_path / "out")
    kept = r"what is finished is kept in .*/\.out\.partial" if block else "nothing was left behind"
    expect_failure(done, f"No space left on device: .*{kept}")
    assert (tmp_path / ".out.partial" / "block-00001.safetensors").exists() == bool(block)
    assert not (tmp_path / "out").exists()


def interrupt(arguments: list[str], mark: Path) -> tuple[int, str]:
    """Run until a file is there, send what Ctrl-C sends; exit code and stderr."""
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a job in the background ignore it
    try:
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    finally:
        signal.signal(signal.SIGINT, heard)
    while not mark.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def test_ctrl_c_before_the_first_block_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text(json.dumps(tiny_recipe(iterations=100_000)))
    arguments = command("model", tiny_llama, "--recipe", tmp_path / "slow.yaml", "-o", tmp_path / "out")
    code, error = interrupt(arguments, tmp_path / ".out.partial" / "run.json")
    assert (code, error) == (2, "compress: interrupted; nothing was left behind\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slow.yaml"]


def test_ctrl_c_names_what_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    rules = [tiny_recipe(targets=["*.0.*_proj"])["weights"], tiny_recipe(iterations=100_000)["weights"]]
    (tmp_path / "slow.yaml").write_text(json.dumps({**tiny_recipe(), "weights": rules}))
    arguments = command("model", tiny_llama, "--recipe", tmp_path / "slow.yaml", "-o", tmp_path / "out")
    kept = tmp_path / ".out.partial"
    code, error = interrupt(arguments, kept / "block-00000.safetensors")
    done, last = error.splitlines()
    assert code == 2 and f"what is finished is kept in {kept}" in last and done == "5 of 21 matrices compressed"
    assert (kept / "block-00000.safetensors").exists() and not (tmp_path / "out").exists()


SLOW_IMPORT = """
import sys, time
sys.path.insert(0, {folder!r})  # a torch that takes long to import
import subspace_compress
sys.argv = ["compress", "recipes", "check", "cospadi-20"]
subspace_compress.main()
"""


def test_ctrl_c_during_the_imports(tmp_path: Path) -> None:
    mark = tmp_path / "importing"
    (tmp_path / "torch.py").write_text(f"import time\nopen({str(mark)!r}, 'w').close()\ntime.sleep(60)\n")
    code, error = interrupt([sys.executable, "-P", "-c", SLOW_IMPORT.format(folder=str(tmp_path))], mark)
    assert code == 2 and error == "compress: interrupted\n"


def test_light_commands_import_neither_torch_nor_transformers() -> None:
    code = """
import sys, subspace_compress
sys.argv = ["compress", *sys.argv[1:]]
try:
    subspace_compress.main()
finally:
    assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
    for arguments, expected in ((["recipes", "list"], "cospadi-20"), (["--version"], f"compress {__version__}\n")):
        done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and expected in done.stdout and done.stderr == "", done.stderr


def test_the_package_registers_its_format_on_import() -> None:
    code = """
import compress, sys
assert "compress.hf" in sys.modules and "compress.run" not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "compress" in AUTO_QUANTIZER_MAPPING
assert all(getattr(compress, name) is not None for name in compress.__all__) and set(compress.__all__) <= set(dir(compress))
assert not hasattr(compress, "nothing")
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def run_here(monkeypatch, capsys, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line inside this process."""
    from compress.cli import main

    monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main()
    return subprocess.CompletedProcess(sys.argv, left.value.code, *capsys.readouterr())


def expect_failure(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Exit code 2, and on stderr one line and nothing else but how far the work was."""
    assert done.returncode == 2, done.stdout + done.stderr
    *before, last = done.stderr.splitlines(keepends=True)
    assert last.startswith("compress: ") and last.endswith("\n"), done.stderr
    assert all(re.fullmatch(r"\d+ of \d+ (matrices (tried|compressed)|windows)\n", line) for line in before), done.stderr
    assert re.search(message, done.stderr), done.stderr
