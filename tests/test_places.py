"""What is shared does not say where somebody's files are."""

from __future__ import annotations

import sys

import pytest

from ctxprune.evals.places import without_place
from ctxprune.evals.provenance import provenance


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("/home/me/models/smol", "smol"),
        ("/home/me/models/smol/", "smol"),
        ("~/smol", "smol"),
        (r"C:\Users\me\smol", "smol"),
        ("--model=/home/me/smol", "--model=smol"),
        ("gate:0.8@/home/me/smol", "gate:0.8@smol"),
        ("/home/me/a.json,/home/me/b.json", "a.json,b.json"),
        ("runs/smol", "runs/smol"),
        ("../smol", "../smol"),
        ("gpt2", "gpt2"),
        ("https://huggingface.co/gpt2", "https://huggingface.co/gpt2"),
        ("0,0.5,0.8", "0,0.5,0.8"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_a_path_is_cut_to_its_name(text: str, shared: str) -> None:
    assert without_place(text) == shared


def test_results_have_a_command_without_places(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["/opt/bin/ctxprune", "eval", "--model", "/home/me/my model", "--out", "r.json"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert provenance()["command"] == "ctxprune eval --model 'my model' --out r.json"
