"""What a user hears, once, when a compressed layer runs its reference for want of a kernel."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def reference_runs(why: str) -> None:
    """Warn; the same reason is given only once."""
    warnings.warn(f"compressed layers run their slow reference: {why}", stacklevel=3)
