"""Recipes: the shipped ones parse, mistakes are named before anything runs, bounds are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctxprune import recipes
from ctxprune.cli.run import _check
from ctxprune.pruner.errors import CtxpruneError

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_say_what_they_are(path: Path) -> None:
    _check(recipes.load(str(path)))
    assert recipes.load(path.stem).name == path.stem
    assert path.read_text().startswith("# ")


def test_the_recipes_of_the_docs_are_shipped() -> None:
    assert {"demo", "smoke", "gpt2", "smollm2-135m"} <= set(recipes.names())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "no list of `steps`"),
        ({"steps": [], "expects": []}, "did you mean `expect`"),
        ({"steps": [{"tun": {}}]}, "did you mean `tune`"),
        ({"steps": [{"tune": {"stepps": 3}}]}, "did you mean `steps`"),
        ({"steps": [{"eval": {"sparsety": [0]}}]}, "did you mean `sparsity`"),
        ({"steps": [{"tune": {"sparsity": 2}}]}, "outside"),
        ({"steps": [{"name": "a"}]}, "needs one command"),
        ({"steps": [{"convert": {}}, {"convert": {}}]}, "two steps called"),
        ({"steps": ["convert"]}, "no mapping"),
        ({"steps": [], "expect": ["gate is good"]}, "not understood"),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CtxpruneError, match=message):
        _check(recipes.parse("mine", raw))


def test_unknown_recipes_are_named() -> None:
    with pytest.raises(CtxpruneError, match="did you mean `demo`"):
        recipes.load("dem")
    with pytest.raises(CtxpruneError, match="does not exist"):
        recipes.load("none.yaml")


RESULTS = {
    "gate": {
        "levels": [
            {"sparsity_requested": 0.0, "perplexity": 10.0, "tasks": {}},
            {"sparsity_requested": 0.8, "perplexity": 10.9, "tasks": {"piqa": {"acc": 0.6}}},
        ]
    }
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("gate 0.8 perplexity <= 1.10 * gate 0 perplexity", True),
        ("gate 0.8 perplexity <= 1.05 * gate 0 perplexity", False),
        ("gate 0.8 tasks.piqa.acc >= 0.6", True),
        ("gate 0.8 tasks.piqa.acc >= 0.61", False),
    ],
)
def test_expectations(text: str, holds: bool) -> None:
    (expectation,) = recipes.parse("r", {"steps": [], "expect": [text]}).expect
    assert expectation.check(RESULTS)[0] is holds


@pytest.mark.parametrize(
    "text", ["gate 0.7 perplexity <= 1", "gate 0.8 tasks.none.acc <= 1", "none 0 perplexity <= 1"]
)
def test_expectations_on_what_was_not_measured(text: str) -> None:
    (expectation,) = recipes.parse("r", {"steps": [], "expect": [text]}).expect
    with pytest.raises(CtxpruneError):
        expectation.check(RESULTS)
