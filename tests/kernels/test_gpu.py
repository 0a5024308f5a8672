"""The Triton kernels: numbers in the interpreter and, where there is one, on a GPU; code for real GPUs without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from compress.kernels.gpu_products import COLUMNS, MOST_TOKENS, tile
from helpers import DEVICES

ROOT = Path(__file__).resolve().parents[2]


def measured(script: str, device: str) -> dict:
    """What a script prints that runs the kernels: on `cpu` in the interpreter."""
    done = subprocess.run(
        [sys.executable, "-P", Path(__file__).with_name(script), device], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers(device: str) -> None:
    errors = measured("run_kernels.py", device)
    assert len(errors) > 180
    sums = {name: errors.pop(name) for name in list(errors) if name.startswith("attention")}
    # sums that nearly cancel
    assert len(sums) == 40 and max(sums.values()) < 3e-6
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-6, f"{worst}: {errors[worst]}"  # measured: 3.1e-7 and, on an H100, 5.6e-7


@pytest.mark.parametrize("device", DEVICES)
def test_packed_groups(device: str) -> None:
    """The bytes of the reference, but for what the order of a sum may decide; measured: all of them."""
    cases = measured("run_packing.py", device)
    assert len(cases) > 80 and sum(case["exact"] for case in cases.values()) > 20
    for name, case in cases.items():
        assert case["ratio"] < 1.01, f"{name}: {case}"
        assert not (case["exact"] and case["differ"]), f"{name}: {case}"
    differ, total = (sum(case[key] for case in cases.values() if not case["exact"]) for key in ("differ", "bytes"))
    assert differ < 1e-3 * total


def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "benchmarks" / "compiled_kernels.py", "--quick"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["target"] for line in lines} == {"sm_90"}
    assert all(line["spills"] == 0 for line in lines)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("hopper", [True, False])
def test_tiles_follow_the_tokens(hopper: bool, scaled: bool) -> None:
    found = [tile(tokens, scaled, hopper) for tokens in (1, 16, 17, 33, MOST_TOKENS)]
    assert found[0] == found[1] == (16, COLUMNS // 2 if scaled else COLUMNS)
    assert [taken.tokens for taken in found[2:]] == ([32, 64, 64] if hopper else [16] * 3 if scaled else [32] * 3)
    assert all(taken.columns == COLUMNS // 2 for taken in found[2:])
