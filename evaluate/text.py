"""Evaluation text and its windows: the protocol of every perplexity in this project.

Documents are joined by blank lines, tokenized once and cut into non-overlapping windows from the start; a ragged end is
left out and counted. Every token of a window but its first is predicted from the window alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compress.calibrate.data import Tokens, cut_windows, encode, load_texts, start_tokens
from compress.calibrate.sources import require_texts
from compress.errors import CompressError


def make_windows(
    dataset: str | Sequence[str],
    tokenizer: Any,
    *,
    length: int = 2048,
    limit: int | None = None,
    split: str = "test",
    config: str | None = None,
    column: str = "text",
) -> Tokens:
    """Windows `ids` `[windows, length]`, with notes on what was left out.

    Models that were trained with a beginning-of-sequence token (the tokenizer adds one) get it in every window.

    Raises:
        CompressError: a row without text, or a text that is shorter than one window.
    """
    rows = load_texts(dataset, config=config, split=split, column=column)
    origin = dataset if isinstance(dataset, str) else f"{len(rows)} given texts"
    texts = require_texts(rows, origin, "give --column")
    ids = encode(tokenizer, "\n\n".join(texts), special=False)
    start = start_tokens(tokenizer)
    windows = cut_windows(ids, start, length)
    if not len(windows):
        body = length - len(start)
        raise CompressError(f"the evaluation text has {len(ids)} tokens, one window needs {body}; lower --length")
    used = windows[:limit]
    left = len(ids) - len(used) * (length - len(start))
    notes = (f"{left} of the {len(ids)} tokens of the text were left out",) if left else ()
    return Tokens(used, torch.ones_like(used, dtype=torch.bool), origin, (*rows.notes, *notes))
