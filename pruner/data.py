"""Text to windows of token ids: files, folders, `datasets` names, and the embedded samples."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctxprune.pruner.errors import CtxpruneError

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def read_texts(source: str | None, split: str = "tune") -> list[str]:
    """The documents of a source, in a fixed order.

    Args:
        source: a .txt or .jsonl file (one `{"text": ...}` a line), gzipped or not; a folder of
            such files; a name for `datasets`, with `:config` behind it or not; None: the embedded
            public-domain sample called `split` (`tune`, `calibrate` or `eval`).

    Raises:
        CtxpruneError: no such source, or one without text.
    """
    if source is None:
        packed = files("ctxprune.recipes").joinpath("embedded", f"{split}.jsonl.gz").read_bytes()
        return _lines(gzip.decompress(packed).decode("utf-8"), f"the embedded {split} sample")
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        texts = [text for file in found for text in _read_file(file)]
    elif path.is_file():
        texts = _read_file(path)
    elif source.endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        raise CtxpruneError(f"`{source}` does not exist")
    else:
        texts = _from_hub(source)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CtxpruneError(f"`{source}` has no text", f"give a file ending in {SUFFIXES}")
    return texts


def _read_file(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CtxpruneError(f"`{path}` cannot be read as UTF-8 text: {error}") from error
    return _lines(text, str(path)) if ".jsonl" in path.suffixes else [text]


def _lines(text: str, source: str) -> list[str]:
    texts = []
    for number, line in enumerate(filter(str.strip, text.split("\n")), start=1):
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CtxpruneError(
                f'line {number} of {source} is not JSON with a "text" field'
            ) from error
    return texts


def _from_hub(name: str) -> list[str]:
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        return [str(row["text"]) for row in load_dataset(path, config or None, split="train")]
    except KeyError as error:
        raise CtxpruneError(f'the dataset `{name}` has no field "text"') from error
    except Exception as error:  # the library raises many kinds for "not there" and "no network"
        raise CtxpruneError(
            f"`{name}` is no file here, and no dataset could be loaded: {error}",
            "give a .txt or .jsonl file, or check the name and the network",
        ) from error


def windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> Tensor:
    """Documents, an end-of-text token after each, packed and cut: (windows, length) int64.

    Raises:
        CtxpruneError: less text than one window.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        ids.extend(encode(tokenizer, text) + end)
    count = len(ids) // length
    if count == 0:
        raise CtxpruneError(
            f"the text has {len(ids)} tokens, less than one window of {length}",
            "give more text, or a smaller `--context`",
        )
    return torch.tensor(ids[: count * length]).view(count, length)


def spread(windows: Tensor, count: int) -> Tensor:
    """At most `count` of the windows, spread over the text rather than its beginning."""
    chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows)))
    return windows[chosen.long()]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a piece of text, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
