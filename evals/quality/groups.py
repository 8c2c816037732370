"""The figures of a group of lm-eval's tasks, from those of its tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.group import Group


def summed(group: Group, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics and their errors as lm-eval sums them up, and what `harness.score` says beside.

    Sparsity and rows are means over the documents, differences to the dense model over what their
    metric is a mean of. `of` names the tasks, and `date` is that of the oldest figure.

    Args:
        group: with at least one task and one metric to sum up.
        found: the figures of each task by name; others do not matter.
    """
    names = [task.task_name for task in group.get_all_tasks()]
    tasks = [found[name] for name in names]
    by_filter = {
        name: {
            **{key if "," in key else f"{key},none": value for key, value in figures.items()},
            "sample_len": figures["n"],
        }
        for name, figures in zip(names, tasks, strict=True)
    }
    figures: dict[str, Any] = {
        key.removesuffix(",none"): float(value)
        for key, value in group.aggregate(by_filter).items()
        if "," in key and isinstance(value, (int, float))
    }
    sizes = [each["n"] for each in tasks]
    differences = {}
    for config in group.aggregate_metric_list or ():
        weights = sizes if config.weight_by_size else [1] * len(tasks)
        for metric in (key for key in figures if key.partition(",")[0] == config.metric):
            parts = [each.get("against_dense", {}).get(metric) for each in tasks]
            if None not in parts:
                differences[metric] = _pooled(parts, weights)
    for name in ("sparsity", "rows", "cache_sparsity"):
        values = [each[name] for each in tasks]
        figures[name] = None if None in values else _mean(values, sizes)
    shots = {each["shots"] for each in tasks}
    return {
        **figures,
        **({"against_dense": differences} if differences else {}),
        "n": sum(sizes),
        "documents": sum(each["documents"] for each in tasks),
        "shots": shots.pop() if len(shots) == 1 else None,
        "date": min(each["date"] for each in tasks),
        "of": names,
    }


def _pooled(parts: Sequence[Mapping[str, float]], weights: Sequence[int]) -> dict[str, float]:
    """The weighted mean of differences, and its error, tasks being independent of each other."""
    pooled = {"difference": _mean([part["difference"] for part in parts], weights)}
    errors = [
        part["stderr"] * w for part, w in zip(parts, weights, strict=True) if "stderr" in part
    ]
    if len(errors) == len(parts):
        pooled["stderr"] = math.hypot(*errors) / sum(weights)
    return pooled


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
