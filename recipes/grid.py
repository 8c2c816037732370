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
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ctxprune.pruner.errors import CtxpruneError


def expand(recipe: str, entries: list[Any]) -> Iterator[Any]:
    """The entries of a recipe with every grid written out; others come back as they are.

    A step whose `model` or `adapter` is a grid is done for each of them; a report takes all.
    """
    suffixes: dict[str, list[str]] = {}
    for entry in entries:
        commands = [key for key in entry if key != "name"] if isinstance(entry, dict) else []
        options = entry[commands[0]] if len(commands) == 1 else None
        if not isinstance(options, dict):
            yield entry
            continue
        name = str(entry.get("name", commands[0]))
        builds_on = "adapter" if "adapter" in options else "model"
        of_model = suffixes.get(str(options.get(builds_on)), [""])
        cells = list(_cells(recipe, name, options.get("grid", {})))
        made = []
        for of, (of_grid, values) in itertools.product(of_model, cells):
            made.append(of + of_grid)
            plain = {key: value for key, value in options.items() if key != "grid"}
            if of:
                plain[builds_on] = str(plain[builds_on]) + of
            if "results" in plain and str(plain["results"]) in suffixes:
                plain["results"] = str(plain["results"]) + of
            if "of" in plain:
                plain["of"] = _all_of(plain["of"], suffixes)
            yield {"name": name + of + of_grid, commands[0]: {**plain, **values}}
        suffixes[name] = made


def _cells(recipe: str, step: str, grid: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The suffix and the options of each combination; one of neither without a grid."""
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) for v in grid.values()):
        raise CtxpruneError(
            f"the grid of step `{step}` of recipe `{recipe}` is not understood",
            "write it like `grid: {distill: [0, 0.5]}`",
        )
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        parts = [f"-{key}-{re.sub('[^A-Za-z0-9]+', '_', str(v))}" for key, v in chosen.items()]
        yield "".join(parts), chosen


def _all_of(names: Any, suffixes: Mapping[str, list[str]]) -> list[str]:
    """The names of the evaluations in a report, with each grid's."""
    listed = names if isinstance(names, list) else [names]
    return [str(name) + suffix for name in listed for suffix in suffixes.get(str(name), [""])]
