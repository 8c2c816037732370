"""Results on a model card: tables, and metadata that the hub reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult

from ctxprune.evals.report.merged import Merged
from ctxprune.evals.report.report import metrics_of
from ctxprune.evals.report.report_page import markdown
from ctxprune.evals.results import Evaluation, Level, Scores
from ctxprune.pruner import words
from ctxprune.pruner.checkpoints.card import TASK


def on_card(merged: Merged) -> dict[str, Any]:
    """What `export` is told: `scores`, and `measured`, the tables."""
    return {
        "scores": [each for results in merged.evaluations for each in _scores(results)],
        "measured": markdown(merged, level=0, provenance=False),
    }


def _scores(results: Evaluation) -> Iterator[EvalResult]:
    """The metrics of an evaluation, each with the policy and the level that it is of."""
    text = PureWindowsPath(results.text).name or "a text"
    for level in results.levels:
        said = f"{results.policy} at sparsity {level.sparsity_requested:g}"
        measured: list[tuple[str, Level | Scores]] = [(text, level), *level.tasks.items()]
        for task, scores in measured:
            for metric in metrics_of(scores):
                if metric in scores.figures:
                    yield EvalResult(
                        task_type=TASK,
                        dataset_type=words.line(task),
                        dataset_name=words.line(task),
                        metric_type=words.line(metric),
                        metric_name=words.line(f"{metric}, {said}"),
                        metric_value=scores.figures[metric],
                    )
