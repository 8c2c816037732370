"""Text to windows of token ids: files, folders, `datasets` names, and the embedded samples."""

from __future__ import annotations

import gzip
import json
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctxprune.pruner.errors import CtxpruneError, translated
from ctxprune.pruner.untrusted import check_file, check_text

PLAIN = (".txt", ".txt.gz")
LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
# Read by `datasets`, under the name that it has for them.
TABLES = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
    ".json": "json",
    ".json.gz": "json",
}
SUFFIXES = (*PLAIN, *LINES, *TABLES)
# Where a document is looked for in a row, if nobody says where: as text, or as a conversation.
FIELDS = ("text", "messages")

# Bytes of a document at most: what is longer is no document, and would not fit into memory twice.
LONGEST = 1 << 28
# Seconds that a chat template may take: it is a program of somebody else's.
PATIENCE = 10.0

# A text, or the messages of a conversation: {"role": ..., "content": ...} each.
Document = str | list[dict[str, Any]]


def read_texts(
    source: str | None,
    split: str = "tune",
    *,
    field: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """The documents of a source, in a fixed order.

    Args:
        source: a file (`SUFFIXES`); a folder of such files; a name for `datasets`, with `:config`
            behind it or not; None: the embedded public-domain sample called `split` (`tune`,
            `calibrate` or `eval`).
        field: of each row of a table, or line of JSON, that holds the text or the messages of a
            conversation; None: the first of `FIELDS` that is there.
        tokenizer: whose chat template writes conversations; None: they are refused.

    Raises:
        CtxpruneError: no such source, one without text, or conversations that cannot be written.
    """
    path = Path(source or "")
    documents: list[Document]
    if source is None:
        packed = files("ctxprune.recipes").joinpath("embedded", f"{split}.jsonl.gz").read_bytes()
        lines = gzip.decompress(packed).splitlines()
        documents = _of_lines(lines, f"the embedded {split} sample", None)
    elif path.is_dir():
        found = sorted(
            file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and not file.is_dir()
        )
        documents = [document for file in found for document in _read_file(file, field)]
    elif path.exists() or path.is_symlink():
        documents = _read_file(path, field)
    elif source.endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        raise CtxpruneError(f"`{source}` does not exist")
    else:
        documents = _from_hub(source, field)
    texts = [_written(document, tokenizer) for document in documents if document]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CtxpruneError(f"`{source}` has no text", f"give a file ending in {SUFFIXES}")
    return texts


def _read_file(path: Path, field: str | None) -> list[Document]:
    check_file(path)
    for suffix, kind in TABLES.items():
        if path.name.endswith(suffix):
            return _of_table(path, kind, field)
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            if path.name.endswith(LINES):
                return _of_lines(_lines_of(file), str(path), field)
            return [_plain(file)]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CtxpruneError(f"`{path}` cannot be read as UTF-8 text: {error}") from error


def _lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, none of them kept.

    Raises:
        ValueError: one is too long.
    """
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(f"a line of it has more than {LONGEST >> 20} MB")
        yield line


def _plain(file: IO[bytes]) -> str:
    """A file as one text, with the ends of lines as Unix has them.

    Raises:
        ValueError: it is too long, holds NUL bytes, or is not UTF-8.
    """
    raw = file.read(LONGEST + 1)
    if len(raw) > LONGEST:
        raise ValueError(f"it has more than {LONGEST >> 20} MB; give documents as lines of JSON")
    if b"\0" in raw:
        raise ValueError("it holds NUL bytes, so it is no text")
    return raw.decode("utf-8-sig").replace("\r\n", "\n")


def _of_lines(lines: Iterable[bytes], source: str, field: str | None) -> list[Document]:
    documents = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {source}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise CtxpruneError(f"{where} is not UTF-8: {error.reason}") from error
        except (ValueError, RecursionError) as error:
            raise CtxpruneError(f"{where} is not JSON") from error
        if not isinstance(row, dict):
            raise CtxpruneError(f"{where} is no JSON object")
        documents.append(_document(row, field, where))
    return documents


def _of_table(path: Path, kind: str, field: str | None) -> list[Document]:
    from datasets import load_dataset

    with translated(f"`{path}` cannot be read as {kind}"):
        # Streamed, so that no copy is left in a cache.
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
        return _documents(rows, field, str(path))


def _from_hub(name: str, field: str | None) -> list[Document]:
    from datasets import load_dataset

    path, _, config = name.partition(":")
    with translated(
        f"`{name}` is no file here, and no dataset could be loaded",
        "give a file with text, or check the name and the network",
    ):
        rows = load_dataset(path, config or None, split="train")
        return _documents(rows, field, f"the dataset {name}")


def _documents(rows: Iterable[Mapping[str, Any]], field: str | None, source: str) -> list[Document]:
    return [
        _document(row, field, f"row {number} of {source}") for number, row in enumerate(rows, 1)
    ]


def _document(row: Mapping[str, Any], field: str | None, where: str) -> Document:
    """The document of a row."""
    wanted = FIELDS if field is None else (field,)
    found = next((name for name in wanted if name in row), None)
    if found is None:
        raise CtxpruneError(
            f"{where} has no field {' or '.join(map(repr, wanted))}, but "
            f"{', '.join(map(repr, row)) or 'none at all'}",
            "name the one with the text by `--text-field`",
        )
    document: Document = row[found]
    if isinstance(document, str):
        check_text(document, where)
        return document
    if _is_conversation(document):
        for message in document:
            check_text(message["role"] + message["content"], where)
        return document
    raise CtxpruneError(
        f"the field {found!r} of {where} is neither text nor a list of messages",
        "a message has a `role` and a `content`, both of them text",
    )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )


def _written(document: Document, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A document as the model reads it."""
    if isinstance(document, str):
        return document
    if tokenizer is None or tokenizer.chat_template is None:
        raise CtxpruneError(
            "the text holds conversations, and there is no chat template to write them by",
            "give plain text, or use a model that has one",
        )
    return by_template(tokenizer, document)


def by_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, ask: bool = False
) -> str:
    """Messages as a tokenizer's chat template writes them; `ask`: up to where an answer begins.

    Raises:
        CtxpruneError: the template refuses them.
    """
    with translated("the model's chat template refuses this"), _patience():
        return str(
            tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=ask)
        )


@contextmanager
def _patience() -> Iterator[None]:
    """End what takes more than `PATIENCE` by a TimeoutError; in the main thread, which can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError(f"it takes more than {PATIENCE:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> Tensor:
    """Documents, each ended by an end-of-text token, packed and cut: (windows, length) int64.

    Raises:
        CtxpruneError: less text than one window.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        # A chat template may have ended its conversation already.
        ended = bool(end) and text.rstrip().endswith(tokenizer.eos_token)
        ids.extend(encode(tokenizer, text) + ([] if ended else end))
    count = len(ids) // length
    if count == 0:
        raise CtxpruneError(
            f"the text has {len(ids)} tokens, less than one window of {length}",
            "give more text, or a smaller `--max-length`",
        )
    return torch.tensor(ids[: count * length]).view(count, length)


def spread(windows: Tensor, count: int) -> Tensor:
    """At most `count` of the windows, spread over the text rather than its beginning."""
    chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows)))
    return windows[chosen.long()]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a piece of text, without special tokens.

    Raises:
        CtxpruneError: it holds half a character.
    """
    check_text(text, "the text")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer a token to pad by: any will do, since no padding is attended to."""
    if tokenizer.pad_token_id is None:
        first = tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = first if tokenizer.eos_token is None else tokenizer.eos_token
