"""`ctxprune.json` and the metadata of an adapter, damaged: refused by every command that reads."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outcome import ctxprune, files_of, refused
from safetensors import safe_open
from safetensors.torch import save_file
from test_recipes_faults import mutated

from ctxprune.pruner.checkpoints import adapter
from ctxprune.pruner.checkpoints.checkpoint import SETTINGS, load, read_settings
from ctxprune.pruner.checkpoints.settings import AdapterSettings, FolderSettings, Provenance
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.parsing import json_of

RIGHT: dict[str, Any] = {
    "format": 1,
    "version": "0.1.0",
    "config": {"rank": 32, "context": 128, "levels": {"0.5": [0.5] * 4}, "tuned": 0.5},
    "layers": "4 layers",
    "provenance": {
        "base": "gpt2",
        "origin": {"license": "mit", "language": ["en"]},
        "tune": {"train": "gates", "lr": 0.1},
        "earlier": [{"train": "lora"}],
    },
}


def _with(path: str, value: Any) -> bytes:
    """The right settings with one value in place of another."""
    data = copy.deepcopy(RIGHT)
    *outer, last = path.split("/")
    inner = data
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return json.dumps(data).encode()


# The bytes of a file, and words of the sentence that refuses it.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON"),
    "cut short": (json.dumps(RIGHT).encode()[:100], "is not valid JSON"),
    "not UTF-8": (b'{"config": "\xff"}', "is not UTF-8"),
    "half a character": (b'{"config": {}, "layers": "\\ud800"}', "half a character"),
    "a number": (b"5", "a mapping is needed, not 5"),
    "a list": (b"[]", "a mapping is needed, not []"),
    "null": (b"null", "a mapping is needed, not None"),
    "NaN": (b'{"config": {"tuned": NaN}}', "NaN is no finite number"),
    "Infinity": (b'{"config": {"tuned": -Infinity}}', "no finite number"),
    "beyond a float": (b'{"config": {"tuned": 1e999}}', "1e999 is no finite number"),
    "a key twice": (b'{"config": {}, "config": {}}', "is there twice"),
    "deep": (b"[" * 100_000, "levels deep"),
    "deep and closed": (b"[" * 50 + b"]" * 50, "levels deep"),
    "5,000 digits": (b'{"config": {"rank": ' + b"9" * 5000 + b"}}", "is not valid JSON"),
    "large": (b" " * (2**22 + 1), "larger than"),
    "no config": (b"{}", "config is missing"),
    "an unknown key": (_with("confg", {}), "did you mean `config`"),
} | {
    f"{path} {value!r:.40}": (_with(path, value), words)
    for path, value, words in [
        ("format", 2, "format must be 1, not 2"),
        ("version", 5, "version must be text, not 5"),
        ("layers", None, "layers must be text"),
        ("config", 5, "a mapping is needed, not 5"),
        ("config", [], "a mapping is needed, not []"),
        ("config", None, "a mapping is needed, not None"),
        ("config/rnk", 5, "did you mean `rank`"),
        ("config/rank", "8", "rank must be a whole number, not '8'"),
        ("config/rank", 8.0, "rank must be a whole number, not 8.0"),
        ("config/rank", True, "rank must be a whole number, not True"),
        ("config/rank", None, "rank must be a whole number, not None"),
        ("config/rank", 0, "rank must be at least 1"),
        ("config/rank", 10**12, "rank must be at most 4096"),
        ("config/rank", 10**40, "rank must be at most 4096"),
        ("config/protect_first", -1, "protect_first must be at least 0"),
        ("config/protect_recent", 0, "protect_recent must be at least 1"),
        ("config/attention_bonus", -1, "attention_bonus must be at least 0"),
        ("config/context", 1, "context must be at least 2"),
        ("config/context", 10**12, "context must be at most"),
        ("config/tuned", 1, "tuned must be less than 1"),
        ("config/tuned", "0.5", "tuned must be a number"),
        ("config/max_rows", 3, "a cap of 3 rows is too small"),
        ("config/max_rows", [], "max_rows must be a whole number"),
        ("config/levels", 5, "levels must be a mapping"),
        ("config/levels", [[0.5]], "levels must be a mapping"),
        ("config/levels", {"a": [0.5]}, "the levels are not numbers"),
        ("config/levels", {"2": [0.5]}, "must be less than 1"),
        ("config/levels", {"0.5": 0.5}, "must be a list, not 0.5"),
        ("config/levels", {"0.5": []}, "must not be an empty list"),
        ("config/levels", {"0.5": [[0.5]]}, "must be a number"),
        ("config/levels", {"0.5": [-0.5] * 3}, "must be at least 0"),
        ("config/levels", {"0.5": [0] * 3}, "no layer keeps anything"),
        ("config/levels", {"0.5": [0.5]}, "are of 1 layers, and the model has 4"),
        ("config/levels", {"0.5": [0.5] * 3, "0.6": [0.5]}, "not of equally many layers"),
        ("config/levels", {"0.5": [0.5] * 20_000}, "must have at most 10000 items"),
        ("config/levels", {f"0.{n:05}1": [0.5] for n in range(1001)}, "at most 1000 items"),
        ("provenance", 5, "provenance must be a mapping, not 5"),
        ("provenance", None, "provenance must be a mapping"),
        ("provenance/bas", "x", "provenance.bas is no setting"),
        ("provenance/base", 5, "provenance.base must be text"),
        ("provenance/origin", [], "provenance.origin must be a mapping"),
        ("provenance/origin", {"license": 5}, "provenance.origin.license must be text"),
        ("provenance/tune", 5, "provenance.tune must be a mapping"),
        ("provenance/earlier", {}, "provenance.earlier must be a list"),
        ("provenance/earlier", [5], "item 1 of provenance.earlier must be a mapping"),
        ("provenance/averaged_with", [{"base": 5}], "provenance.averaged_with.base must be text"),
    ]
}


COMMANDS = [
    ("info", "m"),
    ("generate", "--model", "m", "a"),
    ("eval", "--model", "m"),
    ("tune", "--model", "m", "--steps", "1", "--out", "t"),
    ("bench", "--model", "m"),
    ("export", "--model", "m", "--out", "x"),
    ("inspect", "--model", "m", "--text", "a"),
    ("chat", "--model", "m"),
]


@pytest.fixture
def folder(embedded_folder: Path, tmp_path: Path) -> Path:
    """A converted folder whose settings are those above."""
    copied = tmp_path / "m"
    shutil.copytree(embedded_folder, copied)
    (copied / SETTINGS).write_text(json.dumps(RIGHT))
    return copied


def test_the_right_settings_are_taken(folder: Path) -> None:
    assert load(folder).ctxprune.levels == [0.5]
    assert read_settings(folder).provenance["earlier"] == [{"train": "lora"}]


@pytest.mark.parametrize("name", FILES)
def test_damaged_settings_are_refused(name: str, folder: Path) -> None:
    raw, words = FILES[name]
    (folder / SETTINGS).write_bytes(raw)
    before = files_of(folder.parent)
    for command in COMMANDS[:2]:
        refused(ctxprune(*command, cwd=folder.parent), words, SETTINGS)
    assert files_of(folder.parent) == before


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
@pytest.mark.parametrize("name", ["deep", "an unknown key", "provenance 5", "config/levels 5"])
def test_every_command_refuses_them(name: str, command: tuple[str, ...], folder: Path) -> None:
    raw, words = FILES[name]
    (folder / SETTINGS).write_bytes(raw)
    before = files_of(folder.parent)
    refused(ctxprune(*command, cwd=folder.parent), words, SETTINGS)
    assert files_of(folder.parent) == before


def test_a_rank_that_the_gates_do_not_have_allocates_nothing(folder: Path) -> None:
    (folder / SETTINGS).write_bytes(_with("config/rank", 4096))
    refused(ctxprune("generate", "--model", "m", "a", cwd=folder.parent), "do not fit its model")


@pytest.fixture(scope="module")
def adapter_file(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of gates alone for the embedded checkpoint."""
    gates = load(embedded_folder, sparsity=0.0).ctxprune.gates
    about = AdapterSettings(
        config=PruneConfig(levels={0.5: (0.5,) * 4}), provenance=Provenance(), lora_rank=0
    )
    path = tmp_path_factory.mktemp("adapter") / adapter.FILE
    adapter.write(path, adapter.Adapter(about, {}, gates.state_dict(), path.name))
    return path


SAID: dict[str, tuple[str, str]] = {
    "empty": ("", "is not valid JSON"),
    "a list": ("[]", "a mapping is needed"),
    "deep": ("[" * 100_000, "levels deep"),
    "NaN": ('{"config": {"tuned": NaN}, "lora_rank": 0}', "no finite number"),
    "a key twice": ('{"lora_rank": 0, "lora_rank": 0}', "is there twice"),
    "nothing": ("{}", "config is missing"),
    "no rank": ('{"config": {}}', "lora_rank is missing"),
    "an unknown key": ('{"config": {}, "lora_rnk": 0}', "did you mean `lora_rank`"),
    "a word as rank": ('{"config": {}, "lora_rank": "0"}', "lora_rank must be a whole number"),
    "a rank below 0": ('{"config": {}, "lora_rank": -1}', "lora_rank must be at least 0"),
    "a huge rank": ('{"config": {}, "lora_rank": 1000000000000}', "lora_rank must be at most"),
    "a rank of no matrices": ('{"config": {}, "lora_rank": 8}', "the rank of its matrices, 0"),
    "config as a number": ('{"config": 5, "lora_rank": 0}', "a mapping is needed, not 5"),
    "a gate's huge rank": ('{"config": {"rank": 1000000000000}, "lora_rank": 0}', "at most 4096"),
    "another rank": ('{"config": {"rank": 8}, "lora_rank": 0}', "does not fit this model"),
    "other layers": (
        '{"config": {"levels": {"0.5": [0.5]}}, "lora_rank": 0}',
        "are of 1 layers, and the model has 4",
    ),
    "provenance as a number": (
        '{"config": {}, "lora_rank": 0, "provenance": 5}',
        "provenance must be a mapping",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_damaged_metadata_are_refused(name: str, adapter_file: Path, tmp_path: Path) -> None:
    said, words = SAID[name]
    with safe_open(adapter_file, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "a.ctxprune", metadata={"ctxprune": said})
    done = ctxprune("convert", "--adapter", "a.ctxprune", "--out", "m", cwd=tmp_path)
    refused(done, words, "a.ctxprune")
    assert list(files_of(tmp_path)) == ["a.ctxprune"]


ABOUT = {key: RIGHT[key] for key in ("config", "provenance")} | {"lora_rank": 0}


@settings(max_examples=1000, deadline=None)
@given(mutated({"settings": RIGHT}))
def test_any_settings_are_taken_or_refused(raw: Any) -> None:
    _taken_or_refused(FolderSettings, raw)


@settings(max_examples=1000, deadline=None)
@given(mutated({"metadata": ABOUT}))
def test_any_metadata_are_taken_or_refused(raw: Any) -> None:
    _taken_or_refused(AdapterSettings, raw)


def _taken_or_refused(kind: type[FolderSettings | AdapterSettings], raw: Any) -> None:
    """What is taken is written and read again as the same."""
    try:
        taken = kind.from_mapping(json_of(json.dumps(raw), "the file"), "the file")
    except CtxpruneError as error:
        assert error.message.startswith("the file") and "\n" not in error.message
        return
    text = json.dumps(dataclasses.asdict(taken))
    assert kind.from_mapping(json_of(text, "the file"), "the file") == taken


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes_are_json_or_refused(raw: bytes | str) -> None:
    try:
        json_of(raw, "the file")
    except CtxpruneError as error:
        assert error.message.startswith("the file")
