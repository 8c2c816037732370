"""Texts that are damaged, odd or endless: files, folders, stdin, arguments, documents of tasks."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import replace
from datasets import Dataset
from outcome import ctxprune, files_of, refused
from strangers import Folders, arguments, copied, edit, make
from transformers import PreTrainedTokenizerFast

LINE = json.dumps({"text": "It was a dark night."}).encode() + b"\n"
WHOLE = gzip.compress(LINE * 50, mtime=0)


def rows(*given: Any) -> bytes:
    """Rows with a field `text`, as lines of JSON."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in given)


def talk(*messages: Any) -> bytes:
    """One conversation, as a line of JSON."""
    return json.dumps({"messages": list(messages)}).encode()


def parquet(value: Any, name: str = "text") -> bytes:
    """A parquet file with one row."""
    path = Path(os.environ["PYTEST_PARQUET"])
    Dataset.from_list([{name: value}]).to_parquet(str(path))
    return path.read_bytes()


# name of the file, its content, what is said; more arguments are told apart by the name
FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "txt: not UTF-8": ("a.txt", lambda: b"caf\xe9 is here", "cannot be read as UTF-8 text"),
    "txt: UTF-16": ("a.txt", lambda: "night".encode("utf-16"), "cannot be read as UTF-8 text"),
    "txt: surrogates": ("a.txt", lambda: b"a \xed\xa0\x80 b", "cannot be read as UTF-8 text"),
    "txt: empty": ("a.txt", lambda: b"", "has no text"),
    "txt: blank": ("a.txt", lambda: b" \r\n\t\n", "has no text"),
    "txt: a mark alone": ("a.txt", lambda: b"\xef\xbb\xbf", "has no text"),
    "txt: NULs": ("a.txt", lambda: b"\0" * 5000, "holds NUL bytes"),
    "txt: a program": ("a.bin", lambda: b"\x7fELF\2\1\1\0\0", "holds NUL bytes"),
    "zstd": ("a.jsonl.zst", lambda: b"\x28\xb5\x2f\xfd\x04\x58" + b"\x91" * 99, "UTF-8 text"),
    "xz": ("a.txt.xz", lambda: lzma.compress(LINE), "cannot be read as UTF-8 text"),
    "zip": ("a.docx", lambda: b"PK\3\4\x14\0\6\0" + b"\x91" * 99, "holds NUL bytes"),
    "pdf": ("a.pdf", lambda: b"%PDF-1.7\n%\xb5\xb5\xb5\xb5\n", "cannot be read as UTF-8 text"),
    "gz: empty": ("a.txt.gz", lambda: b"", "has no text"),
    "gz: not gz": ("a.txt.gz", lambda: b"plain text", "cannot be read as UTF-8 text"),
    "gz: cut": ("a.txt.gz", lambda: WHOLE[:40], "cannot be read as UTF-8 text"),
    "gz: damaged": (
        "a.jsonl.gz",
        lambda: WHOLE[:20] + b"\xff" * 9 + WHOLE[29:],
        "a.jsonl.gz",
    ),
    "gz: checksum": (
        "a.jsonl.gz",
        lambda: WHOLE[:-8] + b"\0" * 8,
        "cannot be read as UTF-8 text",
    ),
    "jsonl: cut": ("a.jsonl", lambda: LINE + b'{"text": "It', "line 2 of"),
    "jsonl: after a blank line": ("a.jsonl", lambda: LINE + b"\n\n{", "line 4 of"),
    "jsonl: not UTF-8": ("a.jsonl", lambda: LINE + b'{"text": "caf\xe9"}', "line 2 of"),
    "jsonl: half a character": (
        "a.jsonl",
        lambda: LINE + b'{"text": "a \\ud800 b"}',
        "not valid Unicode: character 3",
    ),
    "jsonl: half in a message": (
        "a.jsonl",
        lambda: b'{"messages": [{"role": "user", "content": "\\udfff"}]}',
        "not valid Unicode",
    ),
    "jsonl: deep": ("a.jsonl", lambda: b"[" * 100_000, "line 1 of"),
    "jsonl: a list": ("a.jsonl", lambda: b"[1]\n", "is no JSON object"),
    "jsonl: a string": ("a.jsonl", lambda: b'"It was"\n', "is no JSON object"),
    "jsonl: null": ("a.jsonl", lambda: rows("a", None), "line 2 of"),
    "jsonl: a number": ("a.jsonl", lambda: rows("a", 7), "line 2 of"),
    "jsonl: mixed": ("a.jsonl", lambda: rows("a", ["b"]), "line 2 of"),
    "jsonl: an object": ("a.jsonl", lambda: rows({"a": "b"}), "line 1 of"),
    "jsonl: no field": ("a.jsonl", lambda: b'{"body": "It was"}', "no field 'text' or 'messages'"),
    "jsonl: empty objects": ("a.jsonl", lambda: b"{}\n", "none at all"),
    "jsonl: NULs": ("a.jsonl", lambda: b"\0" * 5000, "is not JSON"),
    "ndjson: cut": ("a.ndjson", lambda: b'{"text"', "line 1 of"),
    "json: cut": ("a.json", lambda: b'[{"text": "a"}, {"te', "cannot be read as json"),
    "json: empty": ("a.json", lambda: b"", "a.json"),
    "json: a number": ("a.json", lambda: b"7", "a.json"),
    "json: objects": ("a.json", lambda: b'[{"text": {"a": 1}}]', "a.json"),
    "json: not UTF-8": ("a.json", lambda: b'[{"text": "caf\xe9"}]', "a.json"),
    "json: deep": ("a.json", lambda: b"[" * 100_000, "a.json"),
    "csv: empty": ("a.csv", lambda: b"", "a.csv"),
    "csv: not UTF-8": ("a.csv", lambda: b"text\ncaf\xe9\n", "a.csv"),
    "csv: no field": ("a.csv", lambda: b"body\nIt was\n", "no field 'text'"),
    "csv: more fields": ("a.csv", lambda: b'text\na\n"b","c","d"\n', "a.csv"),
    "csv: NULs": ("a.csv", lambda: b"\0" * 500, "a.csv"),
    "csv: numbers": ("a.csv", lambda: b"text\n1\n2\n", "row 1 of"),
    "parquet: empty": ("a.parquet", lambda: b"", "cannot be read as parquet"),
    "parquet: a text": ("a.parquet", lambda: b"It was", "cannot be read as parquet"),
    "parquet: cut": ("a.parquet", lambda: parquet("a" * 900)[:200], "cannot be read as parquet"),
    "parquet: magic": ("a.parquet", lambda: b"PAR1" + b"\0" * 90 + b"PAR1", "a.parquet"),
    "parquet: a number": ("a.parquet", lambda: parquet(7), "row 1 of"),
    "parquet: no field": ("a.parquet", lambda: parquet("a", "body"), "no field 'text'"),
    "messages: a string": ("a.jsonl", lambda: b'{"messages": "hello"}', "no chat template"),
    "messages: a number": ("a.jsonl", lambda: b'{"messages": 7}', "neither text nor"),
    "messages: strings": ("a.jsonl", lambda: talk("hello"), "neither text nor"),
    "messages: no role": ("a.jsonl", lambda: talk({"content": "a"}), "neither text nor"),
    "messages: no content": ("a.jsonl", lambda: talk({"role": "user"}), "neither text nor"),
    "messages: null": (
        "a.jsonl",
        lambda: talk({"role": "user", "content": None}),
        "neither text nor",
    ),
    "messages: parts": (
        "a.jsonl",
        lambda: talk({"role": "user", "content": [{"type": "text", "text": "a"}]}),
        "neither text nor",
    ),
    "messages: an odd role": (
        "a.jsonl",
        lambda: talk({"role": 7, "content": "a"}),
        "neither text nor",
    ),
    "messages: no template": (
        "a.jsonl",
        lambda: talk({"role": "user", "content": "a"}),
        "no chat template",
    ),
    "messages: none": ("a.jsonl", lambda: talk(), "has no text"),
}
# Which commands meet which of them: tuning all, the others one of a kind.
SOME = ("txt: not UTF-8", "gz: cut", "jsonl: half a character", "json: cut", "parquet: cut")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Folders:
    return make(tmp_path_factory.mktemp("texts"), tokenizer)


CASES = [("tune", name) for name in FILES]
CASES += [(command, name) for command in ("eval", "inspect") for name in SOME]


@pytest.mark.parametrize(("command", "name"), CASES, ids=[f"{c}, {n}" for c, n in CASES])
def test_a_text_that_will_not_do(
    command: str,
    name: str,
    folders: Folders,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTEST_PARQUET", str(tmp_path_factory.mktemp("p") / "p.parquet"))
    file, content, said = FILES[name]
    if name == "messages: a string":
        said = "less than one window"  # a text by another name
    path = tmp_path / file
    path.write_bytes(content())
    before = files_of(tmp_path)
    done = ctxprune(*arguments(command, folders.tuned, path, tmp_path / "out"), cwd=tmp_path)
    if said == "less than one window":
        refused(done, said)
    else:
        refused(done, said, str(path) if "template" not in said else "")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content", "field", "said"),
    [
        ("a.jsonl", LINE, "story", "no field 'story', but 'text'"),
        ("a.jsonl", LINE, "", "text_field must not be empty"),
        ("a.csv", b"text\nIt was\n", "story", "no field 'story', but 'text'"),
        ("a.json", b'[{"text": "It was"}]', "story", "no field 'story', but 'text'"),
        ("a.jsonl", b'{"text": {"a": 1}}', "text", "neither text nor"),
    ],
)
def test_a_field_that_is_not_there(
    name: str, content: bytes, field: str, said: str, folders: Folders, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    given = arguments("tune", folders.tuned, tmp_path / name, tmp_path / "out")
    refused(ctxprune(*given, f"--text-field={field}", cwd=tmp_path), said)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


PLACES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a pipe": ("a.txt", _pipe, "is a pipe, not a file"),
    "a device": ("a.jsonl", lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "dangling": ("a.txt", lambda path: path.symlink_to("nowhere"), "cannot be read"),
    "a loop": ("a.txt", lambda path: path.symlink_to(path.name), "cannot be read"),
    "gone": ("a.txt", lambda path: None, "does not exist"),
    "an empty folder": ("a", Path.mkdir, "has no text"),
    "a folder by a file's name": ("a.txt", Path.mkdir, "has no text"),
}


@pytest.mark.parametrize("command", ["tune", "eval", "inspect"])
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file(name: str, command: str, folders: Folders, tmp_path: Path) -> None:
    file, put, said = PLACES[name]
    put(tmp_path / file)
    done = ctxprune(
        *arguments(command, folders.tuned, tmp_path / file, tmp_path / "out"), cwd=tmp_path
    )
    refused(done, said, file)


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (lambda folder: _pipe(folder / "a.txt"), "is a pipe"),
        (lambda folder: (folder / "a.txt").symlink_to("nowhere"), "cannot be read"),
        (lambda folder: (folder / "b.txt").write_bytes(b"caf\xe9"), "b.txt"),
        (lambda folder: (folder / "notes.md").write_text("not read"), "has no text"),
    ],
)
def test_a_folder_with_one_of_them(
    put: Callable[[Path], Any], said: str, folders: Folders, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    put(folder)
    given = arguments("tune", folders.tuned, folder, tmp_path / "out")
    refused(ctxprune(*given, cwd=tmp_path), said)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_what_is_endless_is_refused_and_not_read(
    name: str, folders: Folders, tmp_path: Path
) -> None:
    """A sparse file of four gigabytes, or what is packed to little; in half a gigabyte."""
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(b"a" * (9 << 20), mtime=0))
    else:
        with path.open("wb") as file:
            file.truncate(4 << 30)

    def small() -> None:
        from ctxprune.pruner import data

        data.LONGEST = 8 << 20  # type: ignore[misc]

    given = arguments("tune", folders.tuned, path, tmp_path / "out")
    refused(ctxprune(*given, cwd=tmp_path, prepare=small), "more than 8 MB", name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbfIt was a night.\r\nAnd a day.\r\n"),
        ("a.jsonl", b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") * 2),
        ("a.ndjson", LINE),
        ("a.json.gz", gzip.compress(b'[{"text": "It was a night."}]', mtime=0)),
        ("noname", b"It was a night."),
        ("a.json", b'["It was a night."]'),
    ],
)
def test_what_is_odd_is_read(name: str, content: bytes, tmp_path: Path) -> None:
    from ctxprune.pruner.data import read_texts

    (tmp_path / name).write_bytes(content)
    read = "".join(read_texts(str(tmp_path / name)))
    assert read.startswith("It was a ") and "\r" not in read


SAID: dict[str, tuple[list[str], bytes, str]] = {
    "stdin: not UTF-8": (["generate", "-"], b"It was\ncaf\xe9", "line 2 of stdin is not UTF-8"),
    "stdin: empty": (["generate", "-"], b"", "prompt is empty"),
    "stdin: to chat": (["chat"], b"caf\xe9\n", "line 1 of stdin is not UTF-8"),
    "stdin: to inspect": (["inspect", "--text", "-"], b"\xff\xfe", "stdin is not UTF-8"),
    "stdin: nothing to inspect": (["inspect", "--text", "-"], b"", "text is empty"),
    "an argument": (["generate", "caf\udce9"], b"", "must be whole characters"),
    "one of two": (["generate", "It was", "caf\udce9"], b"", "item 2 of prompt"),
    "what ends it": (["generate", "It was", "--stop", "\udce9"], b"", "must be whole characters"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_text_that_is_said(name: str, folders: Folders, tmp_path: Path) -> None:
    given, stdin, said = SAID[name]
    talking = edit("tokenizer_config.json", chat_template="{{ messages[-1].content }}")
    model = copied(folders.tuned, tmp_path / "m", talking)
    done = ctxprune(*given, "--model", str(model), cwd=tmp_path, stdin=stdin)
    refused(done, said)
    assert not done.out


# What never ends, given to a command that may read so many bytes of it, and what it says.
ENDLESS: dict[str, tuple[list[str], list[str], int, str]] = {
    "one line": (["generate", "-"], ["cat", "/dev/zero"], 2**20, "line 1 of stdin has more"),
    "lines": (["generate", "-"], ["yes", "It was a night"], 2**20, "stdin has more than 1 MB"),
    "one line, to chat": (["chat"], ["cat", "/dev/zero"], 2**26, "line 1 of stdin has more than"),
    "one line, to inspect": (["inspect", "--text", "-"], ["cat", "/dev/zero"], 2**20, "line 1 of"),
    "lines, to inspect": (["inspect", "--text", "-"], ["yes", "It was a night"], 2**26, ""),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_text_on_stdin_that_never_ends(name: str, folders: Folders, tmp_path: Path) -> None:
    given, source, most, said = ENDLESS[name]
    talking = edit("tokenizer_config.json", chat_template="{{ messages[-1].content }}")
    model = copied(folders.tuned, tmp_path / "m", talking)

    def endless() -> None:
        replace("cli.console.MOST_READ", most)
        os.dup2(subprocess.Popen(source, stdout=subprocess.PIPE).stdout.fileno(), 0)  # type: ignore[union-attr]

    done = ctxprune(*given, "--model", str(model), cwd=tmp_path, prepare=endless)
    if said:
        refused(done, said)
    assert done.code == (2 if said else 0), done.err


DOCUMENTS: dict[str, tuple[bytes | None, str]] = {
    "none": (None, "no file"),
    "empty": (b"", "piqa"),
    "no JSON": (b"{", "piqa"),
    "cut": (b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal', "piqa"),
    "not UTF-8": (b'{"goal": "caf\xe9", "sol1": "b", "sol2": "c", "label": 0}', "piqa"),
    "other fields": (b'{"body": "a"}', "piqa"),
    "a list": (b"[1]", "piqa"),
    "odd types": (b'{"goal": 5, "sol1": [1], "sol2": "c", "label": "x"}', "piqa"),
    "a label beyond": (b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 7}', "piqa"),
    "half a character": (
        b'{"goal": "a \\ud800", "sol1": "b", "sol2": "c", "label": 0}',
        "",
    ),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_of_a_task(name: str, folders: Folders, tmp_path: Path) -> None:
    content, said = DOCUMENTS[name]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    if content is not None:
        (tasks / "piqa.jsonl").write_bytes(content)
    given = arguments("eval", folders.tuned, folders.text, tmp_path / "out")
    more = ["--tasks", "piqa", "--data-dir", str(tasks), "--max-tokens", "512"]
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    refused(ctxprune(*given, *more, cwd=tmp_path, env=cache), said)
    assert not (tmp_path / "out").exists()
