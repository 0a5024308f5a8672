"""Evaluation text and its windows: the protocol of every perplexity in this project.

Documents are joined by blank lines, tokenized once and cut into non-overlapping windows from the start; a ragged end is
left out. Every token of a window but its first is predicted from the window alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.calibrate.data import encode, load_texts
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
) -> Tensor:
    """Token ids `[windows, length]`.

    Models that were trained with a beginning-of-sequence token (the tokenizer adds one) get it in every window.

    Raises:
        CompressError: the text is shorter than one window.
    """
    rows = load_texts(dataset, config=config, split=split, column=column)
    text = "\n\n".join(row for row in rows if isinstance(row, str))
    ids = encode(tokenizer, text)
    start = encode(tokenizer, "")[:1]  # empty, or the token that the tokenizer puts first
    if start and ids[:1] == start:
        ids = ids[1:]
    body = length - len(start)
    count = len(ids) // body
    if count < 1:
        raise CompressError(f"the evaluation text has {len(ids)} tokens, one window needs {body}; lower --length")
    count = min(count, limit or count)
    windows = torch.tensor(ids[: count * body]).view(count, body)
    return torch.cat([torch.tensor(start).expand(count, -1).long(), windows], dim=1)
