"""`ctxprune inspect`: from a text to files, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import ctxprune

from ctxprune.evals.inspect.inspection import InspectConfig, Subject, inspect, page_data
from ctxprune.evals.inspect.page import render
from ctxprune.evals.inspect.trace import Trace
from ctxprune.pruner.errors import CtxpruneError

HOSTILE = "<script>window.pwned = 1</script> & \U0001f600 \u05e9\u05dc\u05d5\u05dd " * 12


def test_a_text_becomes_files_that_agree(embedded_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text(HOSTILE, encoding="utf-8")
    done = ctxprune(
        "inspect", "--model", str(embedded_folder), "--text", "letter.txt", "--tokens", "150",
        "--compare", "sink:0.8", "--compare", "h2o:0.5", "--compare", "sink:0",
        "--out", str(tmp_path / "r/p.html"),
        "--json", "--png", "figures", "--save", "traces", "--terminal", cwd=tmp_path,
    )  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "r" / "p.html").read_text(encoding="utf-8")
    assert "sink 0.8" in done.stderr and "punctuation" in done.stderr and "window" in done.stderr
    data = json.loads(done.stdout)
    assert [view["label"] for view in data["views"]] == ["sink 0.8", "h2o 0.5", "dense"]
    assert HOSTILE.startswith("".join(data["views"][0]["pieces"]))
    saved = sorted((tmp_path / "traces").iterdir())
    assert [file.name for file in saved] == [
        "1-sink.safetensors", "2-h2o.safetensors", "3-dense.safetensors"
    ]  # fmt: skip
    for file, view in zip(saved, data["views"], strict=True):
        found = Trace.load(file)
        assert found.expires.tolist() == view["expires"] and found.tokens == view["tokens"] == 150
        assert found.dropper.tolist() == view["dropper"]
    assert abs(data["views"][0]["sparsity"] - 0.8) < 0.02
    assert data["views"][2]["dense"] and data["views"][2]["sparsity"] == 0.0
    page = (tmp_path / "r" / "p.html").read_text(encoding="utf-8")
    assert "\\u003c" in page
    assert page.count("<script") == render(page_data([], "none")).count("<script")
    figures = list((tmp_path / "figures").iterdir())
    assert figures and all(file.read_bytes().startswith(b"\x89PNG") for file in figures)


def test_without_a_file_the_terminal_gets_it(embedded_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ctxprune.cli.main", "inspect", "--model", str(embedded_folder),
         "--policy", "window", "--sparsity", "0.5", "--text", "-"],
        input="It was a bright\x1b[31m cold day.", cwd=tmp_path, text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    assert "cold day." in done.stdout and "\x1b" not in done.stdout
    assert [file for file in tmp_path.iterdir() if file.name != ".ctxprune"] == []


@pytest.mark.parametrize(("text", "tokens"), [("a", 1), ("a,", 2)])
def test_the_shortest_texts(embedded_folder: Path, text: str, tokens: int) -> None:
    config = InspectConfig(subjects=(Subject("sink", 0.5), Subject("tova", 0.5)))
    data = page_data(inspect(embedded_folder, text, config), "short")
    for view in data["views"]:
        assert view["tokens"] == tokens and len(view["expires"][0]) == tokens
        assert view["survival"]["age"] == [1][: tokens - 1]


def test_equal_labels_are_told_apart(embedded_folder: Path) -> None:
    subjects = (Subject("sink", 0.5), Subject("sink", 0.5, embedded_folder), Subject("sink", 0.5))
    views = inspect(embedded_folder, "It was a day", InspectConfig(subjects=subjects))
    name = embedded_folder.name
    assert [view.label for view in views] == [
        "sink 0.5",
        f"sink 0.5, {name}",
        f"sink 0.5, {name} (3)",
    ]
    assert all(torch.equal(view.trace.expires, views[0].trace.expires) for view in views)


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("gate", Subject("gate", None)),
        ("sink:0.8", Subject("sink", 0.8)),
        ("gate:0.5@./other:1", Subject("gate", 0.5, Path("other:1"))),
        ("tova@m", Subject("tova", None, Path("m"))),
    ],
)
def test_what_is_compared(text: str, subject: Subject) -> None:
    assert Subject.parse(text) == subject


@pytest.mark.parametrize(
    ("text", "message"),
    [("sinc:0.8", "did you mean `sink`"), ("sink:x", "is no sparsity"), ("sink:1", "less than 1")],
)
def test_what_cannot_be_compared(text: str, message: str) -> None:
    with pytest.raises(CtxpruneError) as caught:
        Subject.parse(text)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_five_views_are_too_many() -> None:
    with pytest.raises(CtxpruneError, match="side by side"):
        InspectConfig(subjects=(Subject("sink", 0.5),) * 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "none.txt"], "does not exist"),
        (["--text", "-"], "the text is empty"),
        (["--policy", "gate", "--sparsity", "0.8"], "not tuned"),
        (["--compare", "sink:0.8", "--policy", "sink"], "leave out --policy"),
        (["--tokens", "0"], "at least 1"),
        (["--out", "."], "cannot be written"),
    ],
)
def test_bad_input(
    embedded_folder: Path, arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = ctxprune("inspect", "--model", str(embedded_folder), *arguments, cwd=tmp_path, code=2)
    assert message in done.stderr
