"""Grids: one step of a recipe that stands for several.

    - name: gate
      tune: {model: converted, sparsity: 0.8, grid: {distill: [0, 0.5], lora_rank: [8, 16]}}
    - name: gate-eval
      eval: {model: gate}
    - report: {of: gate-eval}

makes four models, `gate-distill-0-lora_rank-8` and so on, evaluates each, and reports them all.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctxprune.pruner.errors import CtxpruneError

MOST_STEPS = 1000
# A step's: of a folder inside the run's, and the beginning of others.
NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,149}"


@dataclass(frozen=True)
class Entry:
    """A step as it is written: its name, which command, and its options as parsed."""

    name: str
    command: str
    options: Mapping[str, Any]


def expand(recipe: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries of a recipe with every grid written out; others come back as they are.

    A step whose `model` or `adapter` is a grid is done for each of them; a report takes all.

    Raises:
        CtxpruneError: a grid that is empty or not understood, or that makes too many steps.
    """
    suffixes: dict[str, list[str]] = {}
    total = 0
    for entry in entries:
        options = entry.options
        builds_on = "adapter" if "adapter" in options else "model"
        of_model = suffixes.get(str(options.get(builds_on)), [""])
        grid = _grid(recipe, entry)
        total += len(of_model) * math.prod(len(values) for values in grid.values())
        if total > MOST_STEPS:
            raise CtxpruneError(
                f"recipe `{recipe}` has more than {MOST_STEPS:,} steps with that of `{entry.name}`",
                "make its grid smaller",
            )
        made = []
        for of, values in itertools.product(of_model, _cells(grid)):
            suffix = of + "".join(f"-{key}-{_word(value)}" for key, value in values.items())
            made.append(suffix)
            plain = {key: value for key, value in options.items() if key != "grid"}
            if of:
                plain[builds_on] = str(plain[builds_on]) + of
            if "results" in plain and str(plain["results"]) in suffixes:
                plain["results"] = str(plain["results"]) + of
            if "of" in plain:
                plain["of"] = _all_of(plain["of"], suffixes)
            yield Entry(entry.name + suffix, entry.command, {**plain, **values})
        suffixes[entry.name] = made


def _grid(recipe: str, entry: Entry) -> Mapping[str, list[Any]]:
    """The values of each option in the grid of a step; none without a grid."""
    if "grid" not in entry.options:
        return {}
    grid = entry.options["grid"]
    lists = isinstance(grid, Mapping) and all(isinstance(each, list) for each in grid.values())
    if not lists or not grid or not all(grid.values()):
        raise CtxpruneError(
            f"the grid of step `{entry.name}` of recipe `{recipe}` is "
            f"{'empty' if lists else 'not understood'}",
            "write it like `grid: {distill: [0, 0.5]}`",
        )
    return {str(key): values for key, values in grid.items()}


def _cells(grid: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The options of each combination; one of none without a grid."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _word(value: Any) -> str:
    return re.sub("[^A-Za-z0-9]+", "_", str(value))


def _all_of(names: Any, suffixes: Mapping[str, list[str]]) -> list[Any]:
    """The names of the evaluations in a report, with each grid's."""
    listed = names if isinstance(names, list) else [names]
    return [
        name + suffix if suffix else name
        for name in listed
        for suffix in suffixes.get(str(name), [""])
    ]
