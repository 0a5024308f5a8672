"""The one exception that means "your input", as opposed to "our bug", and how foreign exceptions become it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


class CompressError(ValueError):
    """What was expected, what came, what to change; the command line prints it on one line and exits with 2."""


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """What transformers raises while it reads a model is about that model: one line that names it.

    The exceptions are of many kinds: a size of zero in config.json is a ZeroDivisionError deep inside, a negative one a
    RuntimeError of torch, a GGUF file cut off a struct.error.
    """
    try:
        yield
    except CompressError:
        raise
    except (
        ValueError, LookupError, OSError, RuntimeError, TypeError, AttributeError, ArithmeticError, AssertionError,
        struct.error, SafetensorError, StrictDataclassError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CompressError(f"{path} cannot be loaded: {reason}") from error
