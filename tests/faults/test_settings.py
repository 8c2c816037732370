"""`ctxprune.json`, the metadata of adapters and any bytes: refused in one sentence, or right."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from outcome import ctxprune, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ctxprune import recipes
from ctxprune.pruner.checkpoints.settings import AdapterSettings, FolderSettings
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.parsing import json_of, yaml_of
from ctxprune.pruner.schema import Settings

# What stands in `ctxprune.json`: the keys that are set in it, or the file; and what refuses it.
FOLDERS: dict[str, tuple[Any, str]] = {
    "a list": (b"[]", "a mapping is needed"),
    "a number": (b"5", "a mapping is needed"),
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"config": {', "not valid JSON"),
    "not UTF-8": (b'{"config": "\xff"}', "UTF-8"),
    "half a character": (b'{"version": "\\ud800"}', "character"),
    "deep": (b'{"provenance": ' + b"[" * 5000 + b"]" * 5000 + b"}", "deep"),
    "a key twice": (b'{"config": {}, "config": {}}', "twice"),
    "not a number": (b'{"config": {"tuned": NaN}}', "not valid JSON"),
    "infinity": (b'{"config": {"tuned": -Infinity}}', "not valid JSON"),
    "too large a number": (b'{"config": {"tuned": 1e999}}', "not valid JSON"),
    "five megabytes": (b" " * 5_000_000, "is larger than"),
    "no config": (b"{}", "config is missing"),
    "config: 5": ({"config": 5}, "a mapping is needed"),
    "config: a list": ({"config": []}, "a mapping is needed"),
    "config: an unknown key": ({"config": {"rnk": 8}}, "did you mean `rank`"),
    "config: an enormous rank": ({"config": {"rank": 10**12}}, "rank must be at most"),
    "config: rank 0": ({"config": {"rank": 0}}, "rank must be at least 1"),
    "config: rank true": ({"config": {"rank": True}}, "rank must be a whole number"),
    "config: levels that are a list": ({"config": {"rank": 8, "levels": [0.5]}}, "levels"),
    "config: levels of words": ({"config": {"rank": 8, "levels": {"a": [1]}}}, "levels"),
    "config: a level of a word": ({"config": {"rank": 8, "levels": {"0.5": "a"}}}, "levels"),
    "config: a level of none": ({"config": {"rank": 8, "levels": {"0.5": []}}}, "levels"),
    "config: of two layers": ({"config": {"rank": 8, "levels": {"0.5": [1, 1]}}}, "layers"),
    "config: a share of 2": ({"config": {"rank": 8, "levels": {"0.5": [2, 1, 1]}}}, "at most 1"),
    "config: tuned to 1": ({"config": {"rank": 8, "tuned": 1.0}}, "must be less than 1"),
    "config: a small cap": ({"config": {"rank": 8, "max_rows": 1}}, "too small"),
    "provenance: 5": ({"provenance": 5}, "provenance must be a mapping"),
    "provenance: an unknown key": ({"provenance": {"bas": "x"}}, "bas"),
    "provenance: tune is a word": ({"provenance": {"tune": "x"}}, "tune"),
    "provenance: base is a number": ({"provenance": {"base": 5}}, "base must be text"),
    "version: 5": ({"version": 5}, "version must be text"),
    "layers: 5": ({"layers": 5}, "layers must be text"),
    "format: 2": ({"format": 2}, "format"),
    "an unknown key": ({"confg": {}}, "did you mean `config`"),
}
READERS = {
    "info": ("info", "m"),
    "eval": ("eval", "--model", "m", "--max-tokens", "64"),
    "tune": ("tune", "--model", "m", "--steps", "1", "--out", "o"),
    "export": ("export", "--model", "m", "--out", "o"),
    "generate": ("generate", "--model", "m", "--no-chat", "It was"),
    "chat": ("chat", "--model", "m"),
    "bench": ("bench", "--model", "m"),
    "inspect": ("inspect", "--model", "m", "--text", "no/such-text"),
}


def _linked(workplace: Path, place: Path) -> Path:
    """The folder `m` of links to the files of a model, and a `ctxprune.json` of its own."""
    folder = place / "m"
    folder.mkdir()
    for file in (workplace / "m").iterdir():
        if file.is_file() and file.name != "ctxprune.json":
            (folder / file.name).hardlink_to(file)
    return folder / "ctxprune.json"


@pytest.mark.parametrize("reader", ["info", "generate"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_damaged_folder_is_refused(
    name: str, reader: str, workplace: Path, tmp_path: Path
) -> None:
    change, words = FOLDERS[name]
    file = _linked(workplace, tmp_path)
    about = json.loads((workplace / "m" / "ctxprune.json").read_bytes())
    file.write_bytes(change if isinstance(change, bytes) else json.dumps(about | change).encode())
    done = ctxprune(*READERS[reader], cwd=tmp_path)
    refused(done, words, "m")


@pytest.mark.parametrize("name", ["config: 5", "deep", "provenance: 5"])
@pytest.mark.parametrize("reader", READERS)
def test_every_command_refuses_a_damaged_folder(
    reader: str, name: str, workplace: Path, tmp_path: Path
) -> None:
    change, words = FOLDERS[name]
    file = _linked(workplace, tmp_path)
    about = json.loads((workplace / "m" / "ctxprune.json").read_bytes())
    file.write_bytes(change if isinstance(change, bytes) else json.dumps(about | change).encode())
    refused(ctxprune(*READERS[reader], cwd=tmp_path), "ctxprune.json", words)
    assert not (tmp_path / "o").exists()


# The metadata of an adapter, and what refuses it.
ADAPTERS: dict[str, tuple[str | None | dict[str, Any], str]] = {
    "none": (None, "is no adapter"),
    "no JSON": ("{", "not valid JSON"),
    "a list": ("[]", "a mapping is needed"),
    "not a number": ('{"lora_rank": NaN}', "not valid JSON"),
    "deep": ('{"config": ' + "[" * 5000 + "]" * 5000 + "}", "deep"),
    "no config": ("{}", "config is missing"),
    "config: 5": ({"config": 5}, "a mapping is needed"),
    "config: an unknown key": ({"config": {"rnk": 8}}, "did you mean `rank`"),
    "config: an enormous rank": ({"config": {"rank": 10**12}}, "rank must be at most"),
    "lora_rank: a word": ({"lora_rank": "8"}, "lora_rank must be a whole number"),
    "lora_rank: negative": ({"lora_rank": -1}, "lora_rank must be at least 0"),
    "lora_rank: another": ({"lora_rank": 7}, "lora_rank must be the rank"),
    "provenance: 5": ({"provenance": 5}, "provenance must be a mapping"),
    "an unknown key": ({"confg": {}}, "did you mean `config`"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_damaged_adapter_is_refused(name: str, workplace: Path, tmp_path: Path) -> None:
    change, words = ADAPTERS[name]
    file = tmp_path / "a.ctxprune"
    about = {"config": {"rank": 8}, "provenance": {}, "lora_rank": 0}
    said = json.dumps(about | change) if isinstance(change, dict) else change
    metadata = {} if said is None else {"ctxprune": said}
    save_file({"gates.0.x": torch.zeros(2)}, file, metadata=metadata)
    dense = str(workplace / "dense")
    refused(ctxprune("convert", dense, "--adapter", str(file), "--out", "o", cwd=tmp_path), words)
    assert not (tmp_path / "o").exists()


WORDS = st.one_of(st.text(max_size=6), st.sampled_from(["gate", "auto", "0.5", "\ud800", "\0"]))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**30, -0.0, 5e-324, 1e308]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
SHIPPED = [
    yaml.safe_load((Path(recipes.__file__).parent / f"{name}.yaml").read_text())
    for name in recipes.names()
]
FOLDER = {
    "format": 1,
    "version": "0.1.0",
    "config": {"rank": 8, "levels": {"0.5": [0.4, 0.5, 0.6]}, "tuned": 0.5, "max_rows": None},
    "layers": "3 of 3",
    "provenance": {"base": "m", "origin": {"license": "mit"}, "tune": {}, "earlier": []},
}
ADAPTER = {key: FOLDER[key] for key in ("config", "provenance")} | {"lora_rank": 0}


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value holds others."""
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    found = [(*place, key) for key, _ in pairs]
    return found + [deep for at in found for deep in _places(value[at[-1]], at)]


@st.composite
def mutated(draw: Any, originals: list[Any]) -> Any:
    """One of some values, with a few places in it changed, added or gone."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            break
        *path, key = draw(st.sampled_from(places))
        inside = value
        for step in path:
            inside = inside[step]
        how = draw(st.sampled_from(["change", "remove", "add"]))
        if how == "remove":
            del inside[key]
        elif how == "add" and isinstance(inside, dict):
            inside[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            inside[key] = draw(VALUES)
    return value


def _told(error: CtxpruneError) -> None:
    assert error.message and len(error.message) < 10_000 and "\n" not in error.message


@settings(max_examples=1000, deadline=None)
@given(mutated(SHIPPED), st.binary(max_size=4), st.floats(0, 1))
def test_any_bytes_of_a_recipe_are_taken_or_refused(raw: Any, junk: bytes, at: float) -> None:
    text = yaml.safe_dump(raw).encode("utf-8", "surrogatepass")
    place = int(at * len(text))
    try:
        recipes.parse("mine", yaml_of(text[:place] + junk + text[place:], "`mine`"))
    except CtxpruneError as error:
        _told(error)


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from([(FolderSettings, FOLDER), (AdapterSettings, ADAPTER)]).flatmap(
        lambda pair: st.tuples(st.just(pair[0]), mutated([pair[1]]))
    )
)
def test_any_settings_of_a_folder_are_taken_or_refused(case: tuple[type[Settings], Any]) -> None:
    kind, raw = case
    try:
        kind.from_mapping(json_of(json.dumps(raw), "`a.json`"), "`a.json`")
    except CtxpruneError as error:
        _told(error)


def test_the_shipped_adapters_are_read_as_they_are() -> None:
    for file in (Path(recipes.__file__).parent / "adapters").glob("*.ctxprune"):
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata()["ctxprune"]
        assert AdapterSettings.from_mapping(json_of(said, file.name), file.name).config.levels
        assert load_file(file)
