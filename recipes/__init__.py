"""Recipes: whole experiments as YAML, read and checked before anything runs.

    steps:
      - name: gate
        tune: {model: converted, sparsity: 0.8}
    expect:
      - gate-eval 0.8 perplexity <= 1.10 * dense-eval 0 perplexity

A step is a command with its own options, underscored; `model` names an earlier step or a folder.
A step may be a grid (`recipes.grid`). An expectation compares the results of `eval` steps: STEP
LEVEL METRIC, or a number.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ctxprune.pruner.errors import CtxpruneError, choose
from ctxprune.recipes.grid import expand

COMMANDS = ("convert", "tune", "export", "generate", "eval", "report")

# A name becomes a folder inside the run's.
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_VALUE = r"[\w-]+ [\d.]+ [\w.]+"
_EXPECTATION = re.compile(
    rf"(?P<left>{_VALUE}) (?P<sign><=|>=) (?:(?P<factor>[\d.]+) \* )?(?P<right>{_VALUE}|[\d.]+)"
)


@dataclass(frozen=True)
class Step:
    """One command: its name in the recipe, which command, and its options."""

    name: str
    command: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Expectation:
    """A bound on results: `left sign factor * right`."""

    text: str
    left: str
    sign: str
    factor: float
    right: str

    def steps(self) -> list[str]:
        """Names of the eval steps that it compares."""
        return [side.split()[0] for side in (self.left, self.right) if " " in side]

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
        name, text = path.stem, path.read_text(encoding="utf-8")
    else:
        name = choose("recipe", source, names())
        text = files("ctxprune.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CtxpruneError(f"recipe `{source}` is not valid YAML: {error}") from error
    return parse(name, raw)


def parse(name: str, raw: Any) -> Recipe:
    """Check parsed YAML (see `load`)."""
    if not isinstance(raw, dict) or not isinstance(raw.get("steps"), list):
        raise CtxpruneError(f"recipe `{name}` has no list of `steps`")
    for key in raw:
        choose(f"key in recipe `{name}`", key, ("steps", "expect"))
    expect = raw.get("expect") or []
    if not isinstance(expect, list):
        raise CtxpruneError(f"`expect` in recipe `{name}` is no list")
    steps: list[Step] = []
    for entry in expand(name, raw["steps"]):
        steps.append(_step(name, entry, [step.name for step in steps]))
    return Recipe(name, tuple(steps), tuple(_expectation(text) for text in expect))


def _step(recipe: str, entry: Any, earlier: list[str]) -> Step:
    if not isinstance(entry, dict):
        raise CtxpruneError(f"a step of recipe `{recipe}` is no mapping: {entry!r}")
    commands = [key for key in entry if key != "name"]
    if len(commands) != 1:
        raise CtxpruneError(f"a step of recipe `{recipe}` needs one command, not {commands}")
    command = choose(f"command in recipe `{recipe}`", str(commands[0]), COMMANDS)
    name = str(entry.get("name", command))
    if name in earlier:
        raise CtxpruneError(f"recipe `{recipe}` has two steps called `{name}`")
    if not _NAME.fullmatch(name):
        raise CtxpruneError(
            f"`{name}` cannot be the name of a step", "use letters, digits, `-` and `_`"
        )
    options = entry[command] or {}
    if not isinstance(options, dict):
        raise CtxpruneError(
            f"step `{name}` of recipe `{recipe}` has no options, but `{options}`",
            f"write it like `{command}: {{model: NAME}}`",
        )
    return Step(name, command, options)


def _expectation(text: str) -> Expectation:
    found = _EXPECTATION.fullmatch(str(text).strip())
    if not found:
        raise CtxpruneError(
            f"the expectation `{text}` is not understood",
            "write it like `gate 0.8 perplexity <= 1.10 * dense 0 perplexity`",
        )
    factor = float(found["factor"] or 1.0)
    return Expectation(str(text), found["left"], found["sign"], factor, found["right"])


def _value(text: str, results: Mapping[str, Mapping[str, Any]]) -> float:
    if " " not in text:
        return float(text)
    step, level, metric = text.split()
    rows = results[choose("eval step in an expectation", step, results)]["levels"]
    for row in rows:
        if row["sparsity_requested"] == float(level):
            value: Any = row
            for part in metric.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if isinstance(value, int | float):
                return float(value)
            raise CtxpruneError(f"`{step}` has no `{metric}` at level {level}")
    raise CtxpruneError(f"`{step}` was not evaluated at level {level}")
