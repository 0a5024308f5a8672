"""Imports go one way, and our folders never shadow Hugging Face's packages."""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from pathlib import Path

from helpers import ROOT

FOLDERS = {"compress": "compress", **{f"compress.{n}": n for n in ("kernels", "calibrate", "evaluate", "recipes")}}
# package: what it must not import
FORBIDDEN = {
    "compress/layers": ("compress.methods", "compress.calibrate", "compress.run", "compress.evaluate", "compress.solvers"),
    "compress/cache": ("compress.methods", "compress.run", "compress.calibrate", "compress.recipe"),
    "compress/methods": ("compress.run", "compress.cli", "compress.evaluate", "compress.checkpoint", "compress.recipe"),
    "compress/solvers": ("compress.methods", "compress.layers", "compress.run", "compress.calibrate", "compress.model"),
    "kernels": ("compress.layers", "compress.methods", "compress.run", "compress.model", "transformers"),
    "calibrate": ("compress.methods", "compress.layers", "compress.run", "compress.recipe"),
    "evaluate": ("compress.methods", "compress.run", "compress.recipe"),
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_go_one_way() -> None:
    for folder, forbidden in FORBIDDEN.items():
        for file in (ROOT / folder).rglob("*.py"):
            for name in imported(file):
                wrong = [bad for bad in forbidden if name == bad or name.startswith(bad + ".")]
                assert not wrong, f"{file.relative_to(ROOT)} imports {name}"


def test_checkpoints_load_without_methods_or_data() -> None:
    names = imported(ROOT / "compress" / "hf.py")
    assert not any(name.startswith(("compress.methods", "compress.calibrate", "compress.run")) for name in names)


def test_folders_do_not_shadow_hugging_face() -> None:
    for name in ("evaluate", "kernels"):
        spec = importlib.util.find_spec(name)
        assert spec is None or Path(str(spec.origin)).parent.parent != ROOT, f"{name} resolves to the checkout"


def test_every_package_folder_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    assert found == listed


def test_no_file_grows_past_reading() -> None:
    for folder in FOLDERS.values():
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 420, f"{file} should be split"
