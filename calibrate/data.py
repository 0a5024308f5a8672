"""Text to token batches.

In the `stream` layout documents are joined by blank lines and windows of full length are cut from the token stream at
places drawn by the seed, without overlap; in `documents` each row is one sequence, cut at the length and padded. Models
that were trained with a token at the start of every sequence (the tokenizer adds one) see it at the start of every window,
as in evaluation: without it Llama and Gemma compute something else than they ever will in use. A chat template writes its
own special tokens, so nothing is added to what it renders. Too little text is an error that says how much is missing, and
what was not used is counted in `Tokens.notes`: nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.calibrate.sources import Row, Rows, chat_messages, load_texts, local_file, require_texts
from compress.errors import CompressError

__all__ = [
    "Rows",
    "Tokens",
    "chat_messages",
    "cut_windows",
    "encode",
    "load_texts",
    "local_file",
    "make_tokens",
    "start_tokens",
]


@dataclass(frozen=True)
class Tokens:
    """Token ids `[samples, length]`, the mask of those that are not padding, where they came from and what was left out."""

    ids: Tensor
    mask: Tensor
    origin: str
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return int(self.mask.sum())

    def digest(self) -> str:
        """Hash of the tokens, recorded with the result."""
        data = torch.stack([self.ids, self.mask.long()]).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()

    def first(self, count: int) -> Tokens:
        """As many of the first sequences as hold at most `count` tokens, one at the least."""
        rows = max(1, int((self.mask.sum(dim=1).cumsum(dim=0) <= count).sum()))
        return replace(self, ids=self.ids[:rows], mask=self.mask[:rows])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor | None]]:
        """`(ids, mask)` of `size` samples each; the mask is None where nothing is padded."""
        pairs = zip(self.ids.split(size), self.mask.split(size), strict=True)
        return [(ids, None if mask.all() else mask) for ids, mask in pairs]


def make_tokens(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    layout: str = "stream",
    chat_template: bool = False,
    origin: str = "texts",
) -> Tokens:
    """Tokenize rows into `samples` sequences of `length`.

    Raises:
        CompressError: too few tokens (or, for documents, rows), with the number that is missing.
    """
    if chat_template:
        texts = _rendered(rows, tokenizer, origin)
    else:
        texts = require_texts(rows, origin, "set calibration.column, or calibration.chat_template=true")
    make = _documents if layout == "documents" else _stream
    tokens = make(texts, tokenizer, samples, length, seed, chat_template, origin)
    return Tokens(tokens.ids, tokens.mask, origin, (*getattr(rows, "notes", ()), *tokens.notes))


def _rendered(rows: Sequence[Row], tokenizer: Any, origin: str) -> list[str]:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise CompressError("calibration.chat_template: this tokenizer has no chat template")
    texts = []
    for number, row in enumerate(rows):
        try:
            texts.append(tokenizer.apply_chat_template(chat_messages(row), tokenize=False))
        except CompressError as error:
            raise CompressError(f"{origin}, row {number}: {error}") from error
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise CompressError(f"{origin}, row {number}: the chat template refuses it: {reason}") from error
    return texts


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a long text, without the tokenizer's warning about the model's context."""
    return tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text: usually nothing, or the beginning-of-sequence token."""
    bare, whole = encode(tokenizer, "a", special=False), encode(tokenizer, "a")
    places = range(len(whole) - len(bare) + 1)
    return next((whole[:place] for place in places if whole[place : place + len(bare)] == bare), [])


def cut_windows(ids: list[int], start: list[int], length: int) -> Tensor:
    """All windows `[windows, length]` that a token stream gives, one behind the other; `start` is in front of each.

    Raises:
        CompressError: a length that leaves no room behind the start tokens.
    """
    body = length - len(start)
    if body < 1:
        raise CompressError(
            f"windows of {length} tokens have no room behind the {len(start)} start tokens; raise the length"
        )
    count = len(ids) // body
    windows = torch.tensor(ids[: count * body], dtype=torch.long).view(count, body)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), windows], dim=1)


def _stream(texts: list[str], tokenizer: Any, samples: int, length: int, seed: int, rendered: bool, origin: str) -> Tokens:
    start = start_tokens(tokenizer)
    if rendered and start:  # a window begins with the start token already: a second one behind it never occurs in use
        opening = "".join(tokenizer.convert_ids_to_tokens(start))
        texts = [text.removeprefix(opening) for text in texts]
    stream = encode(tokenizer, "\n\n".join(texts), special=False)
    windows = cut_windows(stream, start, length)
    body = length - len(start)
    if len(windows) < samples:
        advice = f"calibration.samples to {len(windows)}" if len(windows) else "calibration.length"
        raise CompressError(
            f"{origin} gives {len(stream)} tokens; {samples} x {body} = {samples * body} are needed, "
            f"{samples * body - len(stream)} more; lower {advice} or give more text"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    ids = windows[order].contiguous()
    left = len(stream) - samples * body
    notes = (f"{left} of the {len(stream)} tokens of the text were not drawn",) if left else ()
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), origin, notes)


def _documents(
    texts: list[str], tokenizer: Any, samples: int, length: int, seed: int, rendered: bool, origin: str
) -> Tokens:
    real = [text for text in texts if text.strip()]
    if len(real) < samples:
        raise CompressError(f"{origin} gives {len(real)} documents; {samples} are needed, {samples - len(real)} more")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    ids = torch.zeros(samples, length, dtype=torch.long)
    mask = torch.zeros(samples, length, dtype=torch.bool)
    cut = lost = 0
    for row, index in enumerate(order.tolist()):
        tokens = encode(tokenizer, real[index], special=not rendered)
        cut, lost = cut + (len(tokens) > length), lost + max(0, len(tokens) - length)
        ids[row, : len(tokens)] = torch.tensor(tokens[:length])
        mask[row, : len(tokens)] = True
    if not mask.any():
        raise CompressError(f"the {samples} documents drawn from {origin} hold no tokens")
    notes = []
    if len(texts) > len(real):
        notes.append(f"{len(texts) - len(real)} of {len(texts)} documents are blank and were left out")
    if len(real) > samples:
        notes.append(f"{len(real) - samples} of {len(real)} documents were not drawn")
    if cut:
        notes.append(f"{cut} of {samples} documents are longer than {length} tokens; {lost} tokens of them were left out")
    return Tokens(ids, mask, origin, tuple(notes))
