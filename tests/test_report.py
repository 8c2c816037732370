"""Tables and plot of results."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from ctxprune.evals.report import report
from ctxprune.evals.report.report import LEGEND, metrics_of
from ctxprune.evals.results import Evaluation, Scores, measured


def result(
    model: str, policy: str, points: list[tuple[float, float, float]], **fields: Any
) -> dict[str, Any]:
    """An evaluation with (requested, realised, perplexity) points."""
    task = {"acc": 0.42, "acc_norm": 0.45, "stderr": 0.049, "sparsity": 0.31, "rows": 44.4}
    task["n"] = 100
    levels = [
        {
            "sparsity_requested": requested,
            "sparsity": realised,
            "cache_sparsity": realised,
            "rows": 512 * (1 - realised) if requested else None,
            "perplexity": value,
            "tokens": 51100,
            "tasks": {"hellaswag": task} if requested else {},
        }
        for requested, realised, value in points
    ]
    every = 16 if policy == "h2o" else 1
    return {
        "model": model,
        "policy": policy,
        "evict": "reading",
        "evicts_every": every,
        "context": 512,
        "prompt": None,
        "levels": levels,
    } | fields


def typed(results: list[dict[str, Any]]) -> list[Evaluation]:
    return [measured(Evaluation, each) for each in results]


def markdown(results: list[dict[str, Any]]) -> str:
    return report.markdown(typed(results))


def rich_tables(results: list[dict[str, Any]]) -> list[Table]:
    return report.rich_tables(typed(results))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    report.plot(typed(results), path)


RESULTS = [
    result("runs/tuned", "gate", [(0.0, 0.0, 30.1), (0.8, 0.79, 32.3)]),
    result("runs/tuned", "window", [(0.8, 0.8, 220.0)]),
    result("runs/control", "gate", [(0.0, 0.0, 29.7)]),
]


def test_markdown_has_a_row_per_level_and_a_row_per_metric() -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[0] == "| model | policy | sparsity | realised | rows left | perplexity |"
    assert lines[2:6] == [
        "| tuned | dense | 0 | 0.000 |  | 30.10 |",
        "| tuned | gate | 0.8 | 0.790 | 108 (21%) | 32.30 |",
        "| tuned | window | 0.8 | 0.800 | 102 (20%) | 220.00 |",
        "| control | dense | 0 | 0.000 |  | 29.70 |",
    ]
    assert lines[7] == "Perplexity at context 512, on 51,100 tokens"
    start = lines.index("Tasks:") + 2
    assert lines[start] == (
        "| task | metric | model | policy | sparsity | realised | rows left | value | - dense | n |"
    )
    assert lines[start + 2 : start + 6] == [
        "| hellaswag | acc | tuned | gate | 0.8 | 0.310 | 44 | 0.420 ± 0.049 |  | 100 |",
        "| hellaswag | acc | tuned | window | 0.8 | 0.310 | 44 | 0.420 ± 0.049 |  | 100 |",
        "| hellaswag | acc_norm | tuned | gate | 0.8 | 0.310 | 44 | 0.450 |  | 100 |",
        "| hellaswag | acc_norm | tuned | window | 0.8 | 0.310 | 44 | 0.450 |  | 100 |",
    ]
    assert lines[-1] == LEGEND
    assert "1 - `compression_ratio` of kvpress" in LEGEND


def test_every_metric_is_shown_with_its_error_its_documents_and_its_difference() -> None:
    scores = {
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.05,
        "word_perplexity": 21.5,
        "word_perplexity_stderr": 1.25,
        "stderr": 0.05,
        "sparsity": 0.8,
        "rows": 30.2,
        "cache_sparsity": 0.9,
        "capped": 0.0,
        "n": 100,
        "documents": 1319,
        "shots": 5,
        "date": "2026-11-28",
        "against_dense": {"exact_match,strict-match": {"difference": -0.02, "stderr": 0.01}},
    }
    only = result("runs/tuned", "gate", [(0.8, 0.79, 32.3)])
    only["levels"][0]["tasks"] = {"gsm8k": scores}
    only["levels"][0]["against_dense"] = {"nll": {"difference": 0.0392, "stderr": 0.002}}
    text = markdown([only])
    assert "| gate | 0.8 | 0.790 | 108 (21%) | 32.30 | +4.0% ± 0.2% |" in text
    assert (
        "| gsm8k, 5-shot | exact_match,strict-match | gate | 0.8 | 0.800 | 30 (10%) "
        "| 0.250 ± 0.050 | -0.020 ± 0.010 | 100 of 1,319 |"
    ) in text
    assert "| word_perplexity | gate | 0.8 | 0.800 | 30 (10%) | 21.50 ± 1.25 |  |" in text
    assert metrics_of(measured(Scores, scores)) == ["exact_match,strict-match", "word_perplexity"]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_of_a_terminal_have_the_same_rows(width: int) -> None:
    texts, tasks = rich_tables(RESULTS)
    assert (texts.row_count, tasks.row_count) == (4, 4)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(texts, tasks)
    shown = capture.get()
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("0.049") == 2


def with_retrieval() -> dict[str, Any]:
    evaluation = result("runs/tuned", "gate", [(0.0, 0.0, 30.1), (0.8, 0.79, 32.3)])
    for level, acc in zip(evaluation["levels"], (0.9, 0.4), strict=True):
        cells = [
            {"length": length, "depth": depth, "acc": acc + depth / 10, "n": 10}
            for length in (1024, 2048)
            for depth in (0.1, 0.9)
        ]
        scores = {"acc": acc, "stderr": 0.05, "sparsity": 0.0, "chance": 0.1, "cells": cells}
        level["tasks"] = {"retrieval": scores}
    return evaluation


def test_the_cells_of_retrieval_have_a_table_of_their_own() -> None:
    lines = markdown([with_retrieval()]).splitlines()
    assert "| retrieval | acc | dense | 0 | 0.000 |  | 0.900 ± 0.050 |  |  |" in lines
    start = lines.index("| model | policy | sparsity | length | 0.1 | 0.9 |")
    assert lines[start - 2].startswith("Accuracy of retrieval")
    assert lines[start + 2 : start + 6] == [
        "| tuned | dense | 0 | 1024 | 0.91 | 0.99 |",
        "| tuned | dense | 0 | 2048 | 0.91 | 0.99 |",
        "| tuned | gate | 0.8 | 1024 | 0.41 | 0.49 |",
        "| tuned | gate | 0.8 | 2048 | 0.41 | 0.49 |",
    ]
    *_, cells = rich_tables([*RESULTS, with_retrieval()])
    assert cells.row_count == 4


def test_plot_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "perplexity.png"
    plot(RESULTS, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_of_a_dense_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "perplexity.png"
    plot(RESULTS[2:], path)
    assert path.exists()


def test_a_policy_that_evicts_now_and_then_is_said_to() -> None:
    assert "evicts every" not in markdown(RESULTS)
    slow = result("runs/tuned", "h2o", [(0.8, 0.79, 40.0)])
    assert "h2o evicts every 16 tokens at most" in markdown([*RESULTS, slow])


def test_protocols_are_told_apart(tmp_path: Path) -> None:
    protocol = {"context": 1280, "prompt": 1024}
    points = [(0.8, 0.79, 40.0)]
    early = [result("m", policy, points, **protocol) for policy in ("h2o", "gate", "tova")]
    late = [
        result("m", policy, [(0.8, 0.15, 35.0)], evict="prompt", **protocol)
        for policy in ("h2o", "gate")
    ]
    text = markdown([*early, *late])
    assert "| h2o | 0.8 | 0.790 | 108 (21%) | 40.00 |" in text
    assert "| h2o, after the prompt | 0.8 | 0.150 | 435 (85%) | 35.00 |" in text
    note = next(line for line in text.splitlines() if line.startswith("Perplexity at"))
    assert note.startswith("Perplexity at context 1280, scored after 1024, on 51,100 tokens")
    assert "h2o and tova: while reading, where the papers evict after the prompt" in note
    assert "papers" not in markdown(late)
    plot([*early, *late], tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_earlier_versions_have_neither_rows_nor_a_protocol() -> None:
    old = result("m", "h2o", [(0.8, 0.79, 40.0)])
    del old["evict"], old["prompt"], old["levels"][0]["rows"]
    del old["levels"][0]["tasks"]["hellaswag"]["rows"]
    lines = markdown([old]).splitlines()
    assert lines[2] == "| h2o | 0.8 | 0.790 |  | 40.00 |"
    assert "| hellaswag | acc | h2o | 0.8 | 0.310 |  | 0.420 ± 0.049 |  | 100 |" in lines
