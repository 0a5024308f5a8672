"""The recipes that come with the package, as text; listing them needs neither torch nor transformers."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from compress.errors import CompressError
from compress.suggest import unknown


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("compress.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_text(name_or_path: str | Path) -> str:
    """The YAML text of a shipped recipe or of a file."""
    name = str(name_or_path)
    if name in shipped():
        return resources.files("compress.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"} and "/" not in name:
        raise CompressError(unknown("recipe", name, shipped()))
    if not path.is_file():
        raise CompressError(f"recipe file {name} does not exist")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CompressError(f"recipe {name} is not UTF-8 text (byte {error.start})") from error
