"""Recipes: whole experiments as YAML, read and checked before anything runs.

    steps:
      - name: gate
        tune: {model: converted, sparsity: 0.8}
    expect:
      - gate-eval 0.8 perplexity <= 1.10 * dense-eval 0 perplexity

A step is a command with its own options, underscored; `model` names an earlier step or a folder.
A step may be a grid (`recipes.grid`). An expectation compares the results of `eval` steps: STEP
LEVEL METRIC, or a number. What a step takes is in `recipes.steps`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from ctxprune.pruner.errors import CtxpruneError, choose
from ctxprune.pruner.parsing import contents, yaml_of
from ctxprune.pruner.schema import shown
from ctxprune.recipes.grid import NAME, Entry, expand

Config = TypeVar("Config")

_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_VALUE = rf"[\w-]+ {_NUMBER} \S+"
_EXPECTATION = re.compile(
    rf"(?P<left>{_VALUE}) (?P<sign><=|>=) (?:(?P<factor>{_NUMBER}) \* )?"
    rf"(?P<right>{_VALUE}|{_NUMBER})",
    re.ASCII,
)
# Options that name what an earlier step made, or something of the user's: what that has to be.
BUILDS_ON = {"model": Path.is_dir, "reference": Path.is_dir, "adapter": Path.is_file}
# Steps that make a folder, which is kept if it was finished with the same options.
MAKERS = ("convert", "tune", "export")


class Step(Entry):
    """One command, its options checked."""

    def config(self, kind: type[Config]) -> Config:
        """The configuration of its command."""
        return kind(**self.given(kind))

    def given(self, kind: type[Any]) -> dict[str, Any]:
        """Those of its options that belong to a configuration."""
        known = {field.name for field in dataclasses.fields(kind)}
        return {key: value for key, value in self.options.items() if key in known}

    def named(self, key: str) -> list[str]:
        """What an option names: nothing, one thing, or a list of them."""
        given = self.options.get(key)
        if given is None:
            return []
        return [str(name) for name in given] if isinstance(given, list) else [str(given)]

    @property
    def results(self) -> list[str]:
        """Names of the eval steps whose results it reads."""
        return self.named("of") + self.named("results")


@dataclass(frozen=True)
class Expectation:
    """A bound on results: `left sign factor * right`."""

    text: str
    left: str
    sign: str
    factor: float
    right: str

    @property
    def figures(self) -> list[list[str]]:
        """The step, level and metric of each figure that it compares."""
        return [side.split() for side in (self.left, self.right) if " " in side]

    def check(self, results: Mapping[str, Mapping[str, Any]]) -> tuple[bool, str]:
        """Whether it holds for eval results by step name, and the figures in words.

        Raises:
            CtxpruneError: a value that the results do not have.
        """
        left = _value(self.left, results)
        right = self.factor * _value(self.right, results)
        holds = (operator.le if self.sign == "<=" else operator.ge)(left, right)
        return holds, f"{self.text}  ({left:.4g} {self.sign} {right:.4g})"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    name: str
    steps: tuple[Step, ...]
    expect: tuple[Expectation, ...]


def names() -> list[str]:
    """The recipes that are shipped, sorted."""
    folder = files("ctxprune.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def load(source: str) -> Recipe:
    """Read a recipe: the name of a shipped one, or the path of a .yaml file.

    Raises:
        CtxpruneError: no such recipe, or something in it that is not understood.
    """
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        if not path.is_file():
            raise CtxpruneError(f"`{source}` does not exist")
        return parse(path.stem, yaml_of(contents(path), f"`{source}`"))
    name = choose("recipe", source, names())
    raw = files("ctxprune.recipes").joinpath(f"{name}.yaml").read_bytes()
    return parse(name, yaml_of(raw, f"recipe `{name}`"))


def parse(name: str, raw: Any) -> Recipe:
    """Check parsed YAML (see `load`)."""
    from ctxprune.recipes.steps import File

    file = File.from_mapping(raw, f"recipe `{name}`")
    steps: dict[str, Step] = {}
    for entry in expand(name, [_entry(name, each) for each in file.steps]):
        if entry.name in steps:
            raise CtxpruneError(f"recipe `{name}` has two steps called `{entry.name}`")
        steps[entry.name] = _step(name, entry)
    expect = tuple(_expectation(text) for text in file.expect or ())
    return Recipe(name, tuple(steps.values()), expect)


def check(plan: Recipe) -> None:
    """Refuse references to anything that will not be there by then.

    Raises:
        CtxpruneError: naming the step or the expectation.
    """
    from ctxprune.evals.config import EvalConfig
    from ctxprune.recipes.steps import check_figure

    folders: list[str] = []
    evals: dict[str, EvalConfig] = {}
    for step in plan.steps:
        for key, is_there in BUILDS_ON.items():
            for given in step.named(key):
                if not is_there(Path(given)):
                    choose(f"`{key}` of step `{step.name}`", given, folders)
        for name in step.results:
            choose(f"eval step in step `{step.name}`", name, evals)
        if step.command in MAKERS:
            folders.append(step.name)
        if step.command == "eval":
            evals[step.name] = step.config(EvalConfig)
    for expectation in plan.expect:
        for name, level, metric in expectation.figures:
            text = expectation.text
            config = evals[choose(f"eval step in `{text}`", name, evals)]
            check_figure(text, config, float(level), metric)


def _entry(recipe: str, raw: Mapping[str, Any]) -> Entry:
    from ctxprune.recipes.steps import OPTIONS

    commands = [key for key in raw if key != "name"]
    if len(commands) != 1:
        raise CtxpruneError(f"a step of recipe `{recipe}` needs one command, not {len(commands)}")
    command = choose(f"command in recipe `{recipe}`", commands[0], OPTIONS)
    name = raw.get("name", command)
    if not isinstance(name, str):
        raise CtxpruneError(f"the name of a step must be text, not {shown(name)}", "quote it")
    options = {} if raw[command] is None else raw[command]
    if not isinstance(options, dict):
        raise CtxpruneError(
            f"step `{name}` of recipe `{recipe}` has no options, but {shown(options)}",
            f"write it like `{command}: {{model: NAME}}`",
        )
    return Entry(name, command, options)


def _step(recipe: str, entry: Entry) -> Step:
    from ctxprune.recipes.steps import OPTIONS

    OPTIONS[entry.command].from_mapping(entry.options, f"step `{entry.name}` of recipe `{recipe}`")
    if not re.fullmatch(NAME, entry.name):
        raise CtxpruneError(
            f"{shown(entry.name)} cannot be the name of a step",
            "use letters, digits, `-` and `_`, not too many",
        )
    return Step(entry.name, entry.command, entry.options)


def _expectation(text: str) -> Expectation:
    found = _EXPECTATION.fullmatch(text.strip())
    sides = [found["left"], found["right"]] if found else []
    numbers = [float(side.split()[1] if " " in side else side) for side in sides]
    factor = float(found["factor"] or 1.0) if found else math.nan
    if not found or not all(map(math.isfinite, [factor, *numbers])):
        raise CtxpruneError(
            f"the expectation {shown(text)} is not understood",
            "write it like `gate 0.8 perplexity <= 1.10 * dense 0 perplexity`",
        )
    return Expectation(text, found["left"], found["sign"], factor, found["right"])


def _value(text: str, results: Mapping[str, Mapping[str, Any]]) -> float:
    if " " not in text:
        return float(text)
    step, level, metric = text.split()
    rows = results[choose("eval step in an expectation", step, results)]["levels"]
    for row in rows:
        if row["sparsity_requested"] == float(level):
            value = next(_found(row, metric), None)
            if value is None:
                raise CtxpruneError(f"`{step}` has no `{metric}` at level {level}")
            return value
    raise CtxpruneError(f"`{step}` was not evaluated at level {level}")


def _found(figures: Mapping[str, Any], path: str) -> Iterator[float]:
    """The number at keys that are joined by dots, which keys may hold too."""
    for key, value in figures.items():
        if path == key and isinstance(value, int | float):
            yield float(value)
        elif path.startswith(f"{key}.") and isinstance(value, Mapping):
            yield from _found(value, path[len(key) + 1 :])
