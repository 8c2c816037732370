"""Recipes of somebody else: bytes, YAML, grids, options and expectations, before anything runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from outcome import ctxprune, files_of, refused
from test_options import VALUES

from ctxprune import recipes
from ctxprune.pruner.errors import CtxpruneError

SHIPPED = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (Path(__file__).parent.parent.parent / "recipes").glob("*.yaml")
}
HEAD = "steps:\n- {name: c, convert: {}}\n- {name: e, eval: {model: c, sparsity: [0, 0.8]}}\n"


def _bomb(opening: str, closing: str, of: str) -> str:
    """Ten lines, each of which holds the one before nine times."""
    lines = [f"x0: &x0 {of}"]
    for n in range(1, 10):
        lines.append(f"x{n}: &x{n} {opening}{', '.join([f'*x{n - 1}'] * 9)}{closing}")
    return "\n".join(lines)


# The text of a file, and words of the sentence that refuses it.
FILES: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b"steps: \xff\xfe", "is not UTF-8"),
    "UTF-16": ("steps: []".encode("utf-16"), "is not UTF-8"),
    "empty": (b"", "a mapping is needed, not None"),
    "a comment": (b"# nothing", "a mapping is needed, not None"),
    "a list": (b"- a", "a mapping is needed, not ['a']"),
    "a number": (b"5", "a mapping is needed, not 5"),
    "a word": (b"recipe", "a mapping is needed, not 'recipe'"),
    "two documents": (b"steps: []\n---\nsteps: []", "is not valid YAML, line 2"),
    "a tab": (b"steps:\n\t- a", "is not valid YAML, line 2"),
    "unclosed": (b"steps: [", "is not valid YAML"),
    "NUL": (b"steps: \0", "is not valid YAML"),
    "NUL, escaped": (b'steps: [{tune: {model: m, data: "a\\0b"}}]', "must not hold a NUL"),
    "half a character": (b'steps: "\\ud800"', "half a character"),
    "an unknown alias": (b"steps: *a", "undefined alias"),
    "a list in itself": (b"steps: &a [*a]", "a value holds itself"),
    "a mapping in itself": (b"steps: &a {b: *a}", "a value holds itself"),
    "a billion laughs": (_bomb("[", "]", "[ha]").encode(), "stands for more than"),
    "a billion merges": (_bomb("{<<: [", "]}", "{ha: 1}").encode(), "stands for more than"),
    "deep": (b"steps: " + b"[" * 5000, "levels deep"),
    "deep and closed": (b"steps: " + b"[" * 50 + b"]" * 50, "levels deep"),
    "deep by aliases": (
        "\n".join(f"x{n}: &x{n} [{f'*x{n - 1}' if n else 1}]" for n in range(60)).encode(),
        "levels deep",
    ),
    "long": (b"steps: [" + b"1," * 60_000 + b"1]", "more than 20,000 values"),
    "large": (b"#" * (2**22 + 1), "larger than"),
    "a key twice": (b"steps: []\nsteps: []", "a second `steps`"),
    "an option twice": (b"steps:\n- tune: {model: m, lr: 1, lr: 2}", "a second `lr`"),
    "a list as a key": (b"? [steps]\n: 1", "is not valid YAML"),
    "an object": (b"steps: !!python/object/apply:os.system [ls]", "has the tag"),
    "a set": (b"steps: !!set {a, b}", "has the tag `set`"),
    "bytes": (b"steps: !!binary aGk=", "has the tag `binary`"),
    "no number": (b"steps: !!int five", "is not valid YAML"),
    "a number of 5,000 digits": (b"steps: " + b"9" * 5000, "is not valid YAML"),
    "infinity": (b"steps: [{tune: {model: m, lr: .inf}}]", "lr must be a finite number"),
    "not a number": (b"steps: [{tune: {model: m, lr: .nan}}]", "lr must be a finite number"),
    "no steps": (b"expect: []", "steps is missing"),
    "steps that are none": (b"steps:", "steps must be a list, not None"),
    "an empty list of steps": (b"steps: []", "steps must not be an empty list"),
    "steps as a mapping": (b"steps: {convert: {}}", "steps must be a list"),
    "a step that is none": (b"steps: [null]", "item 1 of steps must be a mapping, not None"),
    "an empty step": (b"steps: [{}]", "needs one command, not 0"),
    "two commands": (b"steps: [{convert: {}, tune: {}}]", "needs one command, not 2"),
    "a near command": (b"steps: [{convrt: {}}]", "did you mean `convert`"),
    "a number as a name": (b"steps: [{name: 5, convert: {}}]", "must be text, not 5"),
    "no name": (b"steps: [{name: null, convert: {}}]", "must be text, not None"),
    "a path as a name": (b"steps: [{name: ../x, convert: {}}]", "cannot be the name"),
    "a long name": (b"steps: [{name: " + b"x" * 300 + b", convert: {}}]", "cannot be the name"),
    "a name with a line": (b'steps: [{name: "a\\nb", convert: {}}]', "cannot be the name"),
    "options as a list": (b"steps: [{tune: [model]}]", "has no options"),
    "a near option": (b"steps: [{tune: {model: m, stepps: 1}}]", "did you mean `steps`"),
    "a number as an option": (b"steps: [{tune: {model: m, 5: 1}}]", "unknown key `5`"),
    "no model": (b"steps: [{tune: {}}]", "model is missing"),
    "a model that is none": (b"steps: [{tune: {model: null}}]", "model must be text, not None"),
    "a list of models": (b"steps: [{tune: {model: [a]}}]", "model must be text"),
    "true as steps": (
        b"steps: [{tune: {model: m, steps: yes}}]",
        "must be a whole number, not True",
    ),
    "a word as steps": (b"steps: [{tune: {model: m, steps: ten}}]", "not 'ten'"),
    "quoted steps": (b'steps: [{tune: {model: m, steps: "10"}}]', "not '10'"),
    "huge steps": (b"steps: [{tune: {model: m, steps: 99999999999999999999}}]", "at most"),
    "an unknown policy": (
        b"steps: [{generate: {model: m, prompt: a, policy: x}}]",
        "unknown policy",
    ),
    "no results": (b"steps: [{report: {of: []}}]", "of must not be an empty list"),
    "a report of nothing": (b"steps: [{report: }]", "of is missing"),
    "a grid of nothing": (b"steps: [{convert: {grid: {}}}]", "is empty"),
    "an empty grid": (b"steps: [{convert: {grid: {rank: []}}}]", "is empty"),
    "a grid that is none": (b"steps: [{convert: {grid: null}}]", "is not understood"),
    "a grid of a number": (b"steps: [{convert: {grid: {rank: 5}}}]", "is not understood"),
    "a near option in a grid": (b"steps: [{convert: {grid: {rnk: [1]}}}]", "did you mean `rank`"),
    "a wrong value in a grid": (
        b"steps: [{convert: {grid: {rank: [1, 0]}}}]",
        "rank must be at least",
    ),
    "a grid of 10^9 cells": (
        yaml.safe_dump(
            {"steps": [{"convert": {"grid": {f"o{n}": list(range(10)) for n in range(9)}}}]}
        ).encode(),
        "more than 1,000 steps",
    ),
    "the same cell twice": (b"steps: [{convert: {grid: {rank: [1, 1]}}}]", "two steps called"),
    "expect as a word": (b"steps: [{convert: }]\nexpect: yes", "expect must be a list"),
    "a number as an expectation": (b"steps: [{convert: }]\nexpect: [5]", "must be text, not 5"),
} | {
    text: (f"{HEAD}expect: ['{text}']".encode(), words)
    for text, words in {
        "e is good": "is not understood",
        "": "is not understood",
        "e 0 perplexity": "is not understood",
        "e 0 perplexity = 5": "is not understood",
        "e 0.8.1 perplexity <= 5": "is not understood",
        "e 0 perplexity <= 1e999": "is not understood",
        "e 0 perplexity <= 1.2.3 * e 0 perplexity": "is not understood",
        "e 0 perplexity <= nan": "is not understood",
        "x 0 perplexity <= 5": "unknown eval step",
        "c 0 perplexity <= 5": "unknown eval step",
        "e 0.5 perplexity <= 5": "unknown level",
        "e 1.5 perplexity <= 5": "must be less than 1",
        "e 0 perplexty <= 5": "did you mean `perplexity`",
        "e 0 tasks.piqa.acc <= 5": "unknown task",
        "e 0 perplexity <= e 0 perplexiti": "did you mean `perplexity`",
    }.items()
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused(name: str, tmp_path: Path) -> None:
    raw, words = FILES[name]
    file = tmp_path / "mine.yaml"
    file.write_bytes(raw)
    refused(ctxprune("run", "mine.yaml", cwd=tmp_path), words)
    assert list(files_of(tmp_path)) == ["mine.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "e 0 tasks.hellaswag.acc_norm,none >= 0.2",
        "e 0.8 tasks.gsm8k.exact_match,strict-match >= 2e-1",
        "e 0.80 perplexity <= 1.1 * e 0 perplexity",
        "e 0 against_dense.nll.mean >= -0.5",
    ],
)
def test_an_expectation_is_understood(text: str) -> None:
    tasks = ["hellaswag", "gsm8k"]
    steps = [{"name": "e", "eval": {"model": ".", "sparsity": [0, 0.8], "tasks": tasks}}]
    recipes.check(recipes.parse("mine", {"steps": steps, "expect": [text]}))


def test_a_figure_is_found_whose_keys_hold_dots_and_commas() -> None:
    tasks = {"a.b": {"exact_match,strict-match": 0.25}}
    results = {"e": {"levels": [{"sparsity_requested": 0.5, "tasks": tasks}]}}
    text = "e 0.5 tasks.a.b.exact_match,strict-match <= 0.25"
    plan = recipes.parse("mine", {"steps": [{"convert": None}], "expect": [text]})
    assert plan.expect[0].check(results)[0]


def test_what_yaml_has_is_read_as_it_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "\ufeffsteps:\n- {name: 2020-01-01, tune: &a {model: ., lr: 3e-4}}\n"
        "- {name: b, tune: {<<: *a, steps: 5}}",
        encoding="utf-8",
    )
    first, second = recipes.load(str(file)).steps
    assert (first.name, first.options["lr"], second.options["lr"]) == ("2020-01-01", 3e-4, 3e-4)


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every container of parsed data with each of its keys."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [(data, key) for key in keys] + [place for key in keys for place in _places(data[key])]


@st.composite
def mutated(draw: st.DrawFn, originals: dict[str, Any]) -> Any:
    """One of several parsed files with one or two values replaced, removed or added."""
    data = copy.deepcopy(originals[draw(st.sampled_from(sorted(originals)))])
    for _ in range(draw(st.integers(1, 2))):
        places = _places(data)
        if not places:
            break
        container, key = draw(st.sampled_from(range(len(places))).map(places.__getitem__))
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace" or (what == "add" and isinstance(container, list)):
            container[key] = draw(VALUES)
        elif what == "add":
            container[draw(st.text(max_size=5))] = draw(VALUES)
        else:
            del container[key]
    return data


@settings(max_examples=1000, deadline=None)
@given(mutated(SHIPPED))
def test_any_recipe_is_taken_or_refused(raw: Any) -> None:
    try:
        recipes.check(recipes.parse("mine", raw))
    except CtxpruneError as error:
        assert "\n" not in error.message
