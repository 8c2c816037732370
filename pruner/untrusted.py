"""Files of others, before a library reads them: is it a file, is it JSON, is it text, is it sane.

Libraries wait for a pipe without end, follow an index out of its folder, or make a million layers.
What is only damaged is left to them, and their errors are translated.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.schema import STRICT, Share, conforming, shown

CONFIG = "config.json"
GENERATION = "generation_config.json"
PEFT_CONFIG = "adapter_config.json"
# Whose content is looked at: a JSON object each.
OBJECTS = (CONFIG, GENERATION, "tokenizer_config.json", "special_tokens_map.json")
# What libraries read of the folder of a model.
READ = (".json", ".safetensors", ".jinja", ".model", ".txt")
# Bytes of such an object, and layers of a model, at most: beyond all that exist.
LARGEST, LAYERS = 1 << 26, 10_000
# What every model has some of.
SIZES = ("vocab_size", "hidden_size", "n_embd", "num_attention_heads", "n_head")
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
AGAIN = "fetch it or convert it again"

# Only what is named is looked at.
LENIENT: ConfigDict = {**STRICT, "extra": "ignore"}
# Some models have -1 for none.
Token = Annotated[int, Field(ge=-1, lt=2**31)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


@with_config(LENIENT)
class About(TypedDict, total=False):
    """What every `config.json` says."""

    model_type: Required[Annotated[str, Field(min_length=1)]]
    architectures: list[str] | None


@with_config(LENIENT)
class Generation(TypedDict, total=False):
    """What is heeded of a `generation_config.json`, by `generate` and by who loads the model."""

    bos_token_id: Token | None
    eos_token_id: Token | list[Token] | None
    pad_token_id: Token | None
    temperature: Annotated[float, Field(ge=0.0)] | None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None
    top_p: Share | None
    min_p: Share | None
    repetition_penalty: Annotated[float, Field(gt=0.0)] | None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, lt=2**31)] | None
    bad_words_ids: Annotated[list[Tokens], Field(min_length=1)] | None
    suppress_tokens: Tokens | None
    begin_suppress_tokens: Tokens | None


@with_config(LENIENT)
class Index(TypedDict):
    """Which file each tensor is in."""

    weight_map: dict[str, str]


def check_file(path: Path) -> None:
    """Raise CtxpruneError unless a path leads to a regular file.

    Reading anything else may never end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise CtxpruneError(f"`{path}` does not exist") from error
        reason = getattr(error, "strerror", None) or str(error)
        raise CtxpruneError(f"`{path}` cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        raise CtxpruneError(f"`{path}` is {KINDS.get(stat.S_IFMT(mode), 'no file')}, not a file")


def check_text(text: str, where: str) -> None:
    """Raise CtxpruneError if a text holds half a character: no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CtxpruneError(
            f"{where} is not valid Unicode: character {error.start + 1} is half of one",
            "give it as UTF-8",
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CtxpruneError: it is no file, too large, not UTF-8, no JSON, or something else.
    """
    check_file(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MB")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CtxpruneError(f"`{path}` cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CtxpruneError(f"`{path}` is not valid JSON: {reason}", AGAIN) from error
    if not isinstance(found, dict):
        raise CtxpruneError(f"`{path}`: an object is needed, not {shown(found)}", AGAIN)
    return found


def check_model_folder(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model's folder, of which all that libraries read has been looked at.

    Raises:
        CtxpruneError: something is no file, no JSON, or beyond all bounds; an adapter of peft
            lies beside the weights, which transformers would load, from wherever it says.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CtxpruneError(f"`{folder}` cannot be read: {error.strerror}") from error
    names = {entry.name for entry in entries}
    if PEFT_CONFIG in names and CONFIG not in names:
        raise CtxpruneError(
            f"`{folder}` holds an adapter of peft and no model",
            "merge it into its model first: `model.merge_and_unload().save_pretrained(DIR)`",
        )
    if PEFT_CONFIG in names:
        raise CtxpruneError(
            f"`{folder}` holds an adapter of peft ({PEFT_CONFIG}) beside the weights of a model",
            "move the adapter away, or merge it into its model first",
        )
    if CONFIG not in names:
        raise CtxpruneError(f"`{folder}` has no {CONFIG}", "give the folder of a model")
    for entry in entries:
        if entry.name.endswith(READ):
            check_file(entry)
    found = {name: read_object(folder / name) for name in OBJECTS if name in names}
    check_config(found[CONFIG], folder / CONFIG)
    conforming(Generation, found.get(GENERATION, {}), f"`{folder / GENERATION}`", AGAIN)
    return found[CONFIG]


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise CtxpruneError for a configuration of no type, or with more layers than there are."""
    conforming(About, config, f"`{path}`", AGAIN)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for name, value in part.items():
            counts = name.startswith(("n_", "num_")) and "layer" in name
            if not isinstance(value, int):
                continue
            if (counts and not 0 <= value <= LAYERS) or (name in SIZES and value < 1):
                raise CtxpruneError(
                    f"`{name}` of `{path}` is {str(value)[:24]}, which no model has",
                    "fetch it again",
                )
