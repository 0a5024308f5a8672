"""Make trained Hugging Face language models smaller and faster without training them again.

`import compress` registers the checkpoint format with transformers, so that `from_pretrained` opens compressed models. The
other names are imported when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.version import __version__

if TYPE_CHECKING:
    from compress import hf
    from compress.cache import KVCache
    from compress.checkpoint import load
    from compress.export import export_dense
    from compress.recipe import Recipe
    from compress.run import compress_model

__all__ = ["CompressError", "KVCache", "Recipe", "__version__", "compress_model", "export_dense", "hf", "load"]

_HOMES = {
    "KVCache": "compress.cache",
    "Recipe": "compress.recipe",
    "compress_model": "compress.run",
    "export_dense": "compress.export",
    "load": "compress.checkpoint",
}

if not getattr(sys.modules.get("subspace_compress"), "STARTED", False):  # the console script registers when it must
    importlib.import_module("compress.hf")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
