"""What text is read from, and what is refused."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from ctxprune.pruner.data import encode, read_texts, windows
from ctxprune.pruner.errors import CtxpruneError

TEXTS = ["It was a dark night.", 'She said "no",\nand left.']
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
TALK = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _rows(field: str) -> list[dict[str, str]]:
    return [{"number": "1", field: text} for text in TEXTS]


def _table(write: str, field: str) -> Callable[[Path], None]:
    return lambda path: getattr(Dataset.from_list(_rows(field)), write)(str(path))


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize("field", ["text", "story"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda field: _bytes(_lines(_rows(field)))),
        ("a.jsonl.gz", lambda field: _bytes(gzip.compress(_lines(_rows(field))))),
        ("a.json", lambda field: _bytes(json.dumps(_rows(field)).encode())),
        ("a.csv", lambda field: _table("to_csv", field)),
        ("a.parquet", lambda field: _table("to_parquet", field)),
    ],
)
def test_rows_are_read_from_any_table(
    name: str, write: Callable[[str], Callable[[Path], None]], field: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(field)(path)
    assert read_texts(str(path), field=None if field == "text" else field) == TEXTS
    assert read_texts(str(tmp_path), field=None if field == "text" else field) == TEXTS


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_bytes(_lines([{"text": "first"}]))
    (tmp_path / "notes.md").write_text("not read")
    assert read_texts(str(tmp_path)) == ["first", "second"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_conversations_are_written_by_the_chat_template(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / name
    rows = [{"messages": TALK}]
    if name.endswith("jsonl"):
        path.write_bytes(_lines(rows))
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    tokenizer = copy.deepcopy(tokenizer)
    with pytest.raises(CtxpruneError, match="no chat template"):
        read_texts(str(path), tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert read_texts(str(path), tokenizer=tokenizer) == ["<user>Hello?\n<assistant>Yes.\n"]


def test_each_text_is_ended_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """A template, or a text, that ends with the token itself gets no second one."""
    tokenizer = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token
    ids = windows(tokenizer, ["one", f"two{end}\n"], 1).flatten().tolist()
    assert ids == [
        *encode(tokenizer, "one"),
        tokenizer.eos_token_id,
        *encode(tokenizer, f"two{end}\n"),
    ]
    assert ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(
    ("name", "content", "field", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"', None, "line 2 of .* is not JSON"),
        ("a.jsonl", b"[1]", None, "line 1 of .* is no JSON object"),
        ("a.jsonl", b'{"body": "a"}', None, "no field 'text' or 'messages', but 'body'"),
        ("a.jsonl", b'{"text": "a"}', "story", "no field 'story', but 'text'"),
        ("a.jsonl", b'{"text": 3}', None, "'text' of line 1 of .* is neither text nor"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', None, "neither text nor"),
        ("a.csv", b"body\nx\n", None, "row 1 of .* has no field 'text'"),
        ("a.parquet", b"PAR1 and no more", None, "cannot be read as parquet"),
        ("a.json", b"{", None, "cannot be read as json"),
        ("a.txt.gz", b"not gzip", None, "cannot be read as UTF-8 text"),
        ("a.txt", b"\xff\xfe", None, "cannot be read as UTF-8 text"),
        ("a.txt", b" \n", None, "has no text"),
    ],
)
def test_what_is_not_understood_is_refused(
    name: str, content: bytes, field: str | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CtxpruneError, match=said):
        read_texts(str(path), field=field)
