"""Text to token batches.

Sources: a hub data set (with short names for the usual ones), a local .txt / .raw / .md, .jsonl or .parquet file,
`python-docs` (the English text of CPython's own `pydoc_data.topics`, present on every machine; three topics of four are
its train split, the rest its test split), or a list of strings.
In the `stream` layout documents are joined by blank lines and sequences of full length are cut from the token stream at
places drawn by the seed, without overlap; in `documents` each row is one sequence, cut at the length and padded. Too
little text is an error that says how much is missing, and what was used is counted: nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError

HUB_NAMES = {  # short name: (hub id, configuration)
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
_STREAMED = {"allenai/c4"}  # far larger than anybody calibrates on
_TEXT_SUFFIXES = {".txt", ".raw", ".md"}


@dataclass(frozen=True)
class Tokens:
    """Token ids `[samples, length]`, the mask of those that are not padding, and where they came from."""

    ids: Tensor
    mask: Tensor
    origin: str

    @property
    def count(self) -> int:
        return int(self.mask.sum())

    def digest(self) -> str:
        """Hash of the tokens, recorded with the result."""
        data = torch.stack([self.ids, self.mask.long()]).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()

    def batches(self, size: int) -> list[tuple[Tensor, Tensor | None]]:
        """`(ids, mask)` of `size` samples each; the mask is None where nothing is padded."""
        pairs = zip(self.ids.split(size), self.mask.split(size), strict=True)
        return [(ids, None if mask.all() else mask) for ids, mask in pairs]


def load_texts(
    dataset: str | Sequence[str], *, config: str | None = None, split: str = "train", column: str = "text", rows: int = 20000
) -> list[str | dict]:
    """Rows of a source: strings for plain text, the whole row (a dict) where the column is absent.

    Args:
        rows: at most so many rows of a hub data set that is streamed.
    Raises:
        CompressError: the source is missing, empty, or cannot be reached.
    """
    if not isinstance(dataset, str):
        return _not_empty([str(text) for text in dataset], "the list of texts")
    if dataset == "python-docs":
        from pydoc_data.topics import topics

        held_out = split in ("test", "validation")  # every fourth topic is kept for evaluation
        return [topics[key] for number, key in enumerate(sorted(topics)) if (number % 4 == 3) == held_out]
    path = Path(dataset).expanduser()
    if path.suffix in _TEXT_SUFFIXES or path.suffix in {".jsonl", ".parquet"}:
        if not path.is_file():
            raise CompressError(f"data file {dataset} does not exist")
        if path.suffix in _TEXT_SUFFIXES:
            return _not_empty([path.read_text(encoding="utf-8")], dataset)
        kind = "json" if path.suffix == ".jsonl" else "parquet"
        return _rows(_load_dataset(kind, dataset, data_files=str(path), split="train"), column, dataset)
    name, known_config = HUB_NAMES.get(dataset, (dataset, None))
    stream = name in _STREAMED
    loaded = _load_dataset(name, dataset, name=config or known_config, split=split, streaming=stream)
    return _rows(loaded.take(rows) if stream else loaded, column, dataset)


def _load_dataset(path: str, shown: str, **arguments: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, **arguments)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CompressError(
            f"cannot load data set {shown!r}: {' '.join(str(error).split())[:160]}; without a network use "
            "--set calibration.dataset=python-docs or a local .txt, .jsonl or .parquet file"
        ) from error


def _rows(loaded: Any, column: str, shown: str) -> list[str | dict]:
    rows = list(loaded)
    _not_empty(rows, shown)
    return [row[column] if isinstance(row.get(column), str) else row for row in rows]


def _not_empty(rows: list, shown: str) -> list:
    if not any(not isinstance(row, str) or row.strip() for row in rows):
        raise CompressError(f"{shown} holds no text")
    return rows


def chat_messages(row: str | dict) -> list[dict[str, str]]:
    """A row as chat messages: `messages` as it stands, or instruction / input / output, or one user turn."""
    if isinstance(row, str):
        return [{"role": "user", "content": row}]
    if "messages" in row:
        return row["messages"]
    if "instruction" in row and "output" in row:
        prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]
    raise CompressError(f"expected columns messages, or instruction and output, got {', '.join(row)}")


def make_tokens(
    rows: Sequence[str | dict],
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
    texts = []
    for row in rows:
        if chat_template:
            if not getattr(tokenizer, "chat_template", None):
                raise CompressError("calibration.chat_template: this tokenizer has no chat template")
            texts.append(tokenizer.apply_chat_template(chat_messages(row), tokenize=False))
        elif isinstance(row, str):
            texts.append(row)
        else:
            raise CompressError(
                f"{origin}: no such text column; the columns are {', '.join(row)} (set calibration.column, or chat_template)"
            )
    if layout == "documents":
        return _documents(texts, tokenizer, samples, length, seed, origin)
    stream = torch.tensor(encode(tokenizer, "\n\n".join(texts)))
    whole = len(stream) // length
    if whole < samples:
        raise CompressError(
            f"{origin} gives {len(stream)} tokens; {samples} x {length} = {samples * length} are needed, "
            f"{samples * length - len(stream)} more; lower calibration.samples to {whole} or give more text"
        )
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    ids = stream[: whole * length].view(whole, length)[order]
    return Tokens(ids.contiguous(), torch.ones_like(ids, dtype=torch.bool), origin)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a long text, without the tokenizer's warning about the model's context."""
    return tokenizer(text, verbose=False)["input_ids"]


def _documents(texts: list[str], tokenizer: Any, samples: int, length: int, seed: int, origin: str) -> Tokens:
    texts = [text for text in texts if text.strip()]
    if len(texts) < samples:
        raise CompressError(f"{origin} gives {len(texts)} documents; {samples} are needed, {samples - len(texts)} more")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    ids = torch.zeros(samples, length, dtype=torch.long)
    mask = torch.zeros(samples, length, dtype=torch.bool)
    for row, index in enumerate(order.tolist()):
        tokens = encode(tokenizer, texts[index])[:length]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    return Tokens(ids, mask, origin)
