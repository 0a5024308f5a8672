"""Sources, layouts, seeds, and errors that say what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.calibrate.data import chat_messages, load_texts, make_tokens
from compress.errors import CompressError
from helpers import tiny_tokenizer


def test_stream_is_cut_without_overlap_and_by_seed() -> None:
    rows = [chr(97 + index % 26) * 40 for index in range(50)]
    tokenizer = tiny_tokenizer()
    first = make_tokens(rows, tokenizer, samples=10, length=16)
    again = make_tokens(rows, tokenizer, samples=10, length=16)
    other = make_tokens(rows, tokenizer, samples=10, length=16, seed=1)
    stream = tokenizer("\n\n".join(rows))["input_ids"]
    assert first.digest() == again.digest() != other.digest()
    assert first.count == 160
    pieces = [tuple(stream[i : i + 16]) for i in range(0, len(stream) - 15, 16)]
    assert all(tuple(row.tolist()) in pieces for row in first.ids)


def test_too_little_text_says_how_much_is_missing() -> None:
    with pytest.raises(CompressError, match=r"gives 10 tokens; 2 x 16 = 32 are needed, 22 more"):
        make_tokens(["a" * 10], tiny_tokenizer(), samples=2, length=16)


def test_documents_are_padded_and_masked() -> None:
    tokens = make_tokens(["abc", "", "d" * 99], tiny_tokenizer(), samples=2, length=8, layout="documents")
    assert tokens.mask.sum(dim=1).tolist() == [3, 8]
    assert tokens.count == 11
    assert tokens.batches(1)[1][1] is None and torch.equal(tokens.batches(1)[0][1], tokens.mask[:1])


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": word}) for word in ("x", "y")))
    assert load_texts(str(tmp_path / "a.txt")) == ["hello"]
    assert load_texts(str(tmp_path / "a.jsonl"), column="body") == ["x", "y"]
    with pytest.raises(CompressError, match=r"columns are body.*calibration\.column"):
        make_tokens(load_texts(str(tmp_path / "a.jsonl")), tiny_tokenizer(), samples=1, length=2)


@pytest.mark.parametrize(("name", "text"), [("none.txt", None), ("empty.txt", " \n")], ids=["missing", "empty"])
def test_no_text_is_an_error(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(CompressError, match=r"does not exist|holds no text"):
        load_texts(str(tmp_path / name))


def test_python_docs_need_no_network() -> None:
    train, test = load_texts("python-docs"), load_texts("python-docs", split="test")
    assert sum(map(len, train)) > 200_000 and sum(map(len, test)) > 50_000
    assert not set(train) & set(test)


def test_chat_rows() -> None:
    assert [m["role"] for m in chat_messages({"instruction": "a", "input": "", "output": "b"})] == ["user", "assistant"]
    assert chat_messages("hi") == [{"role": "user", "content": "hi"}]
    tokenizer = tiny_tokenizer()
    with pytest.raises(CompressError, match="no chat template"):
        make_tokens(["x"], tokenizer, samples=1, length=2, chat_template=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokens = make_tokens(["abc"], tokenizer, samples=1, length=9, chat_template=True)
    assert tokenizer.decode(tokens.ids[0]) == "<user>abc"
