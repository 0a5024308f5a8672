"""Keeps the checkout off the import path (Hugging Face owns the names `evaluate` and `kernels`) and seeds every test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

import pytest  # noqa: E402  after the path is clean
import torch  # noqa: E402

from helpers import save_tiny, tiny_recipe  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_compressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama compressed by cospadi; tests copy it before they damage it."""
    from compress.recipe import Recipe
    from compress.run import run

    output = tmp_path_factory.mktemp("compressed") / "llama"
    run(tiny_llama, Recipe.from_dict(tiny_recipe()), output)
    return output
