"""Where text comes from: rows of a hub data set, of a local file, of Python's own documentation, or of a list.

Sources: a hub data set (with short names for the usual ones), a local .txt / .raw / .md, .jsonl or .parquet file,
`python-docs` (the English text of CPython's own `pydoc_data.topics`, present on every machine; three topics of four are
its train split, the rest its test split), or a list of strings.
A row is a string, or a mapping of columns where a chat is asked for or the text column is missing. What a source leaves
out it counts: `Rows.notes` says it in words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.fetch import hub_or_cache

HUB_NAMES = {  # short name: (hub id, configuration)
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
_STREAMED = {"allenai/c4"}  # far larger than anybody calibrates on
_TEXT_SUFFIXES = {".txt", ".raw", ".md"}
_SUFFIXES = _TEXT_SUFFIXES | {".jsonl", ".parquet"}

Row = str | Mapping[str, Any]


class Rows(list):
    """Rows of a source, and in `notes` what was left out of them."""

    def __init__(self, rows: Iterable[Row] = (), notes: tuple[str, ...] = ()) -> None:
        super().__init__(rows)
        self.notes = notes


def load_texts(
    dataset: str | Iterable[Row],
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    chat: bool = False,
    rows: int = 20000,
) -> Rows:
    """Rows of a source: strings where there is text, the whole row where no row has the column.

    Args:
        chat: keep the whole row where it holds a chat (columns messages, or instruction and output), even beside a text.
        rows: at most so many rows of a hub data set that is streamed.
    Raises:
        CompressError: the source is missing, empty, of another encoding, or cannot be reached.
    """
    if not isinstance(dataset, str):
        return _given(dataset, column, chat)
    if dataset == "python-docs":
        from pydoc_data.topics import topics

        if split not in ("train", "test", "validation"):
            raise CompressError(f"python-docs has the splits train, test and validation, got {split!r}")
        held_out = split != "train"  # every fourth topic is kept for evaluation
        return Rows(topics[key] for number, key in enumerate(sorted(topics)) if (number % 4 == 3) == held_out)
    if (path := local_file(dataset)) is not None:
        if path.suffix.lower() in _TEXT_SUFFIXES:
            return _not_empty(Rows([_read(path)]), dataset)
        found = _json_lines(path) if path.suffix.lower() == ".jsonl" else _parquet(path)
        return _texts(found, column, chat, dataset)
    name, known_config = HUB_NAMES.get(dataset, (dataset, None))
    if name in _STREAMED:
        found = _load_dataset(name, dataset, rows, name=config or known_config, split=split, streaming=True)
        notes = (f"only the first {rows} rows of {dataset} were read",) if len(found) == rows else ()
        return _texts(found, column, chat, dataset, notes)
    return _texts(_load_dataset(name, dataset, name=config or known_config, split=split), column, chat, dataset)


def local_file(dataset: str) -> Path | None:
    """The file that a source names, None of other sources.

    Raises:
        CompressError: it is not there.
    """
    if not dataset.strip():
        raise CompressError("the data set has no name; give a hub id, a file or python-docs")
    path = Path(dataset).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        if path.suffix and path.is_file():
            raise CompressError(f"data file {dataset}: expected one that ends in {', '.join(sorted(_SUFFIXES))}")
        return None
    if not path.is_file():
        raise CompressError(f"data file {dataset} does not exist")
    return path


def _given(rows: Iterable[Row], column: str, chat: bool) -> Rows:
    rows = list(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, str | Mapping):
            raise CompressError(f"texts: expected strings, got {type(row).__name__} at position {number}")
    return _texts(rows, column, chat, "the list of texts")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise CompressError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def _json_lines(path: Path) -> list[Mapping[str, Any]]:
    """Read here, not by `datasets`: a wrong line has its number in the message, and dates stay the strings they are."""
    found = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\u" in line:  # only an escape can spell half a pair
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CompressError(f"{path}: line {number} holds half of a surrogate pair") from error
        except (ValueError, RecursionError) as error:
            raise CompressError(f"{path}: line {number} is not valid JSON") from error
        if not isinstance(row, dict):
            raise CompressError(f"{path}: line {number} holds a {type(row).__name__}, expected an object of columns")
        found.append(row)
    return found


def _parquet(path: Path) -> list[Mapping[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        return read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise CompressError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from error


def _load_dataset(path: str, shown: str, first: int | None = None, **arguments: Any) -> list[Mapping[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        with hub_or_cache():
            found = datasets.load_dataset(path, **arguments)
            return list(found if first is None else found.take(first))  # a stream comes while it is read
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CompressError(
            f"cannot load data set {shown!r}: {' '.join(str(error).split())[:160]}; without a network use python-docs or a "
            "local .txt, .jsonl or .parquet file as the dataset"
        ) from error


def _texts(rows: Sequence[Row], column: str, chat: bool, shown: str, notes: tuple[str, ...] = ()) -> Rows:
    kept: list[Row] = []
    empty, nowhere = 0, not any(isinstance(row, Mapping) and column in row for row in rows)
    for number, row in enumerate(rows):
        value = row if isinstance(row, str) else row.get(column)
        if not isinstance(row, str) and (nowhere or (chat and holds_chat(row))):
            kept.append(row)
        elif value is None:
            empty += 1
        elif isinstance(value, str):
            kept.append(value)
        else:
            raise CompressError(f"{shown}, row {number}: expected text in {column!r}, got {type(value).__name__}")
    if empty:
        notes = (*notes, f"{empty} of {len(rows)} rows of {shown} have no {column} and were left out")
    return _not_empty(Rows(kept, notes), f"column {column!r} of {shown}" if empty else shown)


def _not_empty(rows: Rows, shown: str) -> Rows:
    if not any(not isinstance(row, str) or row.strip() for row in rows):
        raise CompressError(f"{shown} holds no text")
    return rows


def holds_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a chat rather than a text."""
    return bool(row.get("messages")) or all(isinstance(row.get(key), str) for key in ("instruction", "output"))


def chat_messages(row: Row) -> list[dict[str, str]]:
    """A row as chat messages: `messages` as it stands, or instruction / input / output, or one user turn."""
    if isinstance(row, str):
        return [{"role": "user", "content": row}]
    if not holds_chat(row):
        raise CompressError(f"expected columns messages, or instruction and output, got {', '.join(row)}")
    messages = row.get("messages")
    if not messages:
        prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
        raise CompressError(f"expected messages to be a list of {{role, content}}, got {messages!r:.80}")
    return messages


def require_texts(rows: Iterable[Row], origin: str, hint: str) -> list[str]:
    """The rows, all of which must be texts; `hint` says what to type otherwise."""
    texts = []
    for row in rows:
        if not isinstance(row, str):
            raise CompressError(f"{origin}: no such text column; the columns are {', '.join(row)} ({hint})")
        texts.append(row)
    return texts
