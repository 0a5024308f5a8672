"""Sources, layouts, seeds, and errors that say what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from compress.calibrate.data import chat_messages, load_texts, make_tokens, start_tokens
from compress.errors import CompressError
from compress.evaluate.text import make_windows
from compress.model import require_fits
from helpers import tiny_model, tiny_tokenizer

CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def with_bos(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: a token in front of every text, and a chat template that writes it too."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    single, pair = "<s> $A", "<s> $A <s> $B"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    return tokenizer


def test_stream_is_cut_without_overlap_and_by_seed() -> None:
    rows = [chr(97 + index % 26) * 40 for index in range(50)]
    tokenizer = tiny_tokenizer()
    first = make_tokens(rows, tokenizer, samples=10, length=16)
    again = make_tokens(rows, tokenizer, samples=10, length=16)
    other = make_tokens(rows, tokenizer, samples=10, length=16, seed=1)
    stream = tokenizer("\n\n".join(rows))["input_ids"]
    assert first.digest() == again.digest() != other.digest()
    assert first.count == 160
    assert first.notes == (f"{len(stream) - 160} of the {len(stream)} tokens of the text were not drawn",)
    pieces = [tuple(stream[i : i + 16]) for i in range(0, len(stream) - 15, 16)]
    assert all(tuple(row.tolist()) in pieces for row in first.ids)


def test_too_little_text_says_how_much_is_missing() -> None:
    with pytest.raises(CompressError, match=r"gives 10 tokens; 2 x 16 = 32 are needed, 22 more"):
        make_tokens(["a" * 10], tiny_tokenizer(), samples=2, length=16)


def test_documents_are_padded_and_masked() -> None:
    tokens = make_tokens(["abc", "", "d" * 99], tiny_tokenizer(), samples=2, length=8, layout="documents")
    assert tokens.mask.sum(dim=1).tolist() == [3, 8]
    assert tokens.count == 11
    assert tokens.notes == (
        "1 of 3 documents are blank and were left out",
        "1 of 2 documents are longer than 8 tokens; 91 tokens of them were left out",
    )
    assert tokens.batches(1)[1][1] is None and torch.equal(tokens.batches(1)[0][1], tokens.mask[:1])


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": word}) for word in ("x", "y")))
    (tmp_path / "A.TXT").write_bytes(b"\xef\xbb\xbfhello")  # as Windows writes it
    assert load_texts(str(tmp_path / "a.txt")) == load_texts(str(tmp_path / "A.TXT")) == ["hello"]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"id": 3}\r\n')
    found = load_texts(str(tmp_path / "b.jsonl"))
    assert found == ["x"] and "1 of 2 rows" in found.notes[0]
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(CompressError, match=r"a.json: expected one that ends in .*\.jsonl"):
        load_texts(str(tmp_path / "a.json"))
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


def test_every_window_begins_with_the_start_token() -> None:
    tokenizer, rows = with_bos(), ["ab" * 40, "cd" * 40]
    start = tokenizer.bos_token_id
    assert start_tokens(tokenizer) == [start] and start_tokens(tiny_tokenizer()) == []
    tokens = make_tokens(rows, tokenizer, samples=4, length=20)
    assert tokens.ids[:, 0].eq(start).all() and tokens.ids[:, 1:].ne(start).all()
    stream = tiny_tokenizer()("\n\n".join(rows))["input_ids"]
    assert all(row in [stream[at : at + 19] for at in range(0, 8 * 19, 19)] for row in tokens.ids[:, 1:].tolist())
    windows = make_windows(rows, tokenizer, length=20)
    assert windows.ids[0, 1:].tolist() == stream[:19] and windows.ids[:, 0].eq(start).all()
    assert make_windows(rows, tiny_tokenizer(), length=20).ids.flatten().tolist() == stream[:160]
    with pytest.raises(CompressError, match="no room behind the 1 start tokens"):
        make_tokens(rows, tokenizer, samples=1, length=1)


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_chats_have_one_start_token(layout: str) -> None:
    tokenizer = with_bos()
    tokens = make_tokens(["abc"] * 8, tokenizer, samples=4, length=16, layout=layout, chat_template=True)
    start = tokenizer.bos_token_id
    assert tokens.ids[:, 0].eq(start).all() and tokens.ids[:, 1:].ne(start).all()
    assert tokenizer.decode(tokens.ids[0]).startswith("<s><user>abc")


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_chat_is_used_even_beside_a_text(tmp_path: Path) -> None:
    row = {"text": "flat", "messages": [{"role": "user", "content": "deep"}]}
    file = write_rows(tmp_path / "a.jsonl", row, {"text": "plain", "messages": None})
    rows = load_texts(file, chat=True)
    assert [chat_messages(row)[0]["content"] for row in rows] == ["deep", "plain"]
    assert load_texts(file) == ["flat", "plain"]


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", {"text": "a" * 30}, {"text": None}, {"text": "b"})
    note = f"1 of 3 rows of {file} have no text and were left out"
    assert make_tokens(load_texts(file), tiny_tokenizer(), samples=1, length=33).notes == (note,)
    assert make_windows(file, tiny_tokenizer(), length=33).notes == (note,)
    with pytest.raises(CompressError, match=r"column 'text' of .*null\.jsonl holds no text"):
        load_texts(write_rows(tmp_path / "null.jsonl", {"text": None}))
    with pytest.raises(CompressError, match=r"number\.jsonl, row 0: expected text in 'text', got int"):
        load_texts(write_rows(tmp_path / "number.jsonl", {"text": 3}))
    with pytest.raises(CompressError, match=r"no such text column; the columns are body \(give --column\)"):
        make_windows(write_rows(tmp_path / "b.jsonl", {"body": "a"}), tiny_tokenizer(), length=3)


def test_a_streamed_source_says_where_it_stopped(monkeypatch) -> None:
    import datasets

    stream = datasets.Dataset.from_dict({"text": ["abc"] * 9}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    assert load_texts("c4", rows=5).notes == ("only the first 5 rows of c4 were read",)
    assert load_texts("c4", rows=10).notes == ()

    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "abc"}
        raise ConnectionError("reset by peer")

    stream = datasets.IterableDataset.from_generator(broken)
    with pytest.raises(CompressError, match=r"cannot load data set 'c4': .*reset by peer; without a network"):
        load_texts("c4", rows=5)


FILES = {
    "empty.jsonl": (b"", "holds no text"),
    "blank.jsonl": (b"\n\n", "holds no text"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
    "list.jsonl": (b"[1]", "line 1 holds a list"),
    "latin.jsonl": ('{"text": "\xe9"}'.encode("latin1"), "not UTF-8"),
    "latin.txt": ("caf\xe9".encode("latin1"), r"not UTF-8 text \(byte 3\)"),
    "broken.parquet": (b"PAR1", "cannot be read"),
    "half.jsonl": (rb'{"text": "\ud83d"}', "line 1 holds half of a surrogate pair"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressError, match=message) as caught:
        load_texts(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_sources_that_name_nothing_are_refused() -> None:
    with pytest.raises(CompressError, match="the data set has no name"):
        load_texts("")
    with pytest.raises(CompressError, match="python-docs has the splits train, test and validation, got 'tset'"):
        load_texts("python-docs", split="tset")
    with pytest.raises(CompressError, match="2 documents drawn from texts hold no tokens"):
        make_tokens(["a", "b"], lambda *_, **__: {"input_ids": []}, samples=2, length=4, layout="documents")


def test_lists_hold_strings() -> None:
    assert load_texts(text for text in ("a", "b")) == load_texts([{"text": "a"}, {"text": "b"}]) == ["a", "b"]
    with pytest.raises(CompressError, match="got int at position 1"):
        load_texts(["a", 3])


TEMPLATES = {
    "raises": "{{ raise_exception('only pairs') }}",
    "undefined": "{{ messages[7].content.x.y }}",
    "type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_refuses_a_row_is_one_line(kind: str) -> None:
    with pytest.raises(CompressError, match="texts, row 0: the chat template refuses it"):
        make_tokens(["abc"], with_bos(TEMPLATES[kind]), samples=1, length=4, chat_template=True)


def test_messages_have_a_role_and_a_content() -> None:
    with pytest.raises(CompressError, match=r"row 1: expected messages to be a list of \{role, content\}"):
        make_tokens(["a", {"messages": [{"from": "x"}]}], with_bos(), samples=1, length=4, chat_template=True)


@pytest.mark.parametrize(
    ("length", "token", "message"), [(65, 9, "has 64 positions, 65 are asked for; lower it"), (8, 300, "300")]
)
def test_tokens_that_a_model_has_no_room_for(length: int, token: int, message: str) -> None:
    model = tiny_model("gpt2", max_position_embeddings=64)
    require_fits(model, torch.full((1, 64), 255), "lower it")
    with pytest.raises(CompressError, match=message):
        require_fits(model, torch.full((1, length), token), "lower it")
