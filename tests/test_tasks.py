"""lm-eval tasks from local files: what their names stand for, what they need, and what is kept of their results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.cache import KVCache, attached
from compress.cache.attached import attach
from compress.errors import CompressError
from compress.evaluate.compare import compare, table, task_differences
from compress.evaluate.tasks import TaskResult, check_tasks, run_tasks
from helpers import task_files, tiny_model, tiny_tokenizer


def test_tags_and_groups_stand_for_their_tasks() -> None:
    assert check_tasks(["ai2_arc", "piqa", "arc_easy"]) == ["arc_challenge", "arc_easy", "piqa"]
    subjects = check_tasks(["mmlu_stem"])
    assert "mmlu_astronomy" in subjects and "mmlu_stem" not in subjects


def test_local_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    data = task_files(tmp_path)
    assert check_tasks(["piqa", "gsm8k"], data, shots=0) == ["piqa", "gsm8k"]
    with pytest.raises(CompressError, match=r"gsm8k shows 5 examples of its train split: put train\.jsonl .* --shots 0"):
        check_tasks(["gsm8k"], data)
    with pytest.raises(CompressError, match=r"arc_easy holds no test\.jsonl or validation\.jsonl"):
        check_tasks(["arc_easy"], data)
    with pytest.raises(CompressError, match="is no directory"):
        check_tasks(["piqa"], tmp_path / "elsewhere")
    with pytest.raises(CompressError, match="unknown task 'piqua'; did you mean 'piqa'"):
        check_tasks(["piqua"], data)


def test_tasks_run_offline_and_differences_are_paired(tmp_path: Path) -> None:
    """Three documents each; filtered metrics keep their filter's name."""
    data, model, original = task_files(tmp_path), tiny_model("llama"), tiny_model("llama", seed=1)
    result = compare(model, tiny_tokenizer(), original, dataset=None, tasks=["piqa", "gsm8k"], data=data, shots=0)
    numbers, difference = result["compressed"]["tasks"], result["difference"]["tasks"]
    assert set(numbers["gsm8k"]) >= {"exact_match,strict-match", "exact_match,flexible-extract_stderr"}
    assert numbers["piqa"]["acc"] - result["original"]["tasks"]["piqa"]["acc"] == difference["piqa"]["acc"]
    assert difference["piqa"]["acc_stderr"] is not None
    text = json.dumps(result, allow_nan=False)
    assert "quality" not in result["compressed"] and json.loads(text) == result
    assert table(result).row_count == 4 and result["environment"]["versions"]["lm_eval"]
    with pytest.raises(CompressError, match=r"tasks piqa: .*give local files"):
        (data / "piqa" / "validation.jsonl").write_text('{"goal": "a"}\n')
        run_tasks(model, tiny_tokenizer(), ["piqa"], data=data)


def test_generation_reads_a_fresh_cache_and_likelihoods_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A windowed cache's prompt is exact, so a likelihood through it would look lossless."""
    data, model = task_files(tmp_path), tiny_model("llama")
    attach(model, "squat", {"window": 8, "group_size": 8})
    made: list[KVCache] = []
    fresh = attached.new_cache
    monkeypatch.setattr(attached, "new_cache", lambda *args, **kwargs: made.append(fresh(*args, **kwargs)) or made[-1])
    run_tasks(model, tiny_tokenizer(), ["piqa"], data=data)
    assert not made
    run_tasks(model, tiny_tokenizer(), ["gsm8k"], data=data, shots=0)
    assert made and len({id(cache) for cache in made}) == len(made) and all(cache.packed_bits_per_element for cache in made)


def test_likelihoods_past_a_windowed_cache_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attach(model, "squat", {"window": 8, "group_size": 8})
    options = {"dataset": None, "tasks": ["piqa", "gsm8k"], "data": task_files(tmp_path), "shots": 0}
    result = compare(model, tiny_tokenizer(), **options)
    assert result["protocol"]["past_the_cache"] == ["piqa"] and not result["protocol"]["decoded"]
    assert "piqa: likelihoods of whole prompts, of which that cache packs nothing" in table(result).title
    attach(model, "fp8", {})  # read in one pass, by all of them
    assert "past_the_cache" not in compare(model, tiny_tokenizer(), **options)["protocol"]


def test_paired_errors_need_one_number_per_document() -> None:
    ours = TaskResult({"acc": 0.5, "acc_stderr": 0.3, "f1": 0.75, "em,strict": None}, {"acc": [1, 0, 1, 0], "f1": [1, 1]})
    theirs = TaskResult({"acc": 0.25, "acc_stderr": 0.3, "f1": 0.25, "em,strict": 0.1}, {"acc": [1, 0, 0, 0], "f1": [0, 0]})
    assert task_differences(ours, theirs) == {
        "acc": 0.25,
        "acc_stderr": pytest.approx(0.25),  # of 0, 0, 1, 0: std 0.5 over sqrt 4
        "f1": 0.5,
        "f1_stderr": None,  # its documents' mean differs by 1: it is no mean of them
        "em,strict": None,
        "em,strict_stderr": None,
    }
