"""Answers to a misspelt name, in one form everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, available: Iterable[str]) -> str:
    """`unknown method 'gtpq'; did you mean 'gptq'? available: ...`; a name from YAML need not be a string."""
    options = sorted(available)
    near = get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}available: {', '.join(options)}"
