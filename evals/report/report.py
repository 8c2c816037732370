"""Results of `evaluate` as Markdown, as a rich table, and as a plot."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from ctxprune.evals.report.charts import BY_REQUEST, REALISED, widen
from ctxprune.evals.report.merged import LATE, READING, decides, out_of_place
from ctxprune.evals.report.tables import Table, markdown_table, terminal_table

Results = Sequence[dict[str, Any]]

METRICS = ("acc", "acc_norm", "perplexity")
RETRIEVED = "Accuracy of retrieval by length of the prompt and depth of the fact"


def markdown(results: Results) -> str:
    """One table with a row per model, policy and level, and a note on what was measured.

    Where retrieval was measured, a table of its cells follows.
    """
    parts = [markdown_table(_scores(results)), _note(results)]
    cells = _retrieved(results)
    if cells.rows:
        parts += [f"{RETRIEVED}:", markdown_table(cells)]
    return "\n\n".join(parts) + "\n"


def rich_table(results: Results) -> RichTable:
    """The same table for a terminal."""
    return terminal_table(_scores(results), _note(results))


def rich_retrieval(results: Results) -> RichTable | None:
    """The table of retrieval's cells for a terminal, None where it was not measured."""
    table = _retrieved(results)
    return terminal_table(table, RETRIEVED) if table.rows else None


def plot(results: Results, path: Path) -> None:
    """PNG of perplexity over sparsity: a line per policy, dense models as horizontals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory: no display, no global state
    axes = figure.add_subplot()
    markers = itertools.cycle("osD^vPX")
    dense: dict[str, float] = {}
    late = any(_evict(result) == LATE for result in results)
    over = "sparsity_requested" if late else "sparsity"
    for result in results:
        points = [(level[over], level["perplexity"]) for level in result["levels"]]
        if any(level["sparsity_requested"] > 0 for level in result["levels"]):
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker=next(markers), label=_label(result, results))
        for level in result["levels"]:
            if level["sparsity_requested"] == 0:
                dense[_model(result)] = level["perplexity"]
    styles = itertools.cycle(("--", ":", "-."))
    for (model, value), style in zip(dense.items(), styles, strict=False):
        axes.axhline(value, color="0.35", linestyle=style, label=f"dense, {model} ({value:.2f})")
    widen(axes, [level["perplexity"] for result in results for level in result["levels"]])
    axes.set_xlabel(BY_REQUEST if late else REALISED)
    axes.set_ylabel("perplexity")
    axes.set_title(_note(results), fontsize="medium")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)


def _model(result: dict[str, Any]) -> str:
    return Path(result["model"]).name or result["model"]


def _label(result: dict[str, Any], results: Results) -> str:
    """The policy, with the model's name where several models are compared."""
    pruned = {
        _model(other)
        for other in results
        if any(level["sparsity_requested"] > 0 for level in other["levels"])
    }
    return decider(result) if len(pruned) == 1 else f"{decider(result)}, {_model(result)}"


def _evict(result: dict[str, Any]) -> str:
    evict: str = result.get("evict", READING)
    return evict


def decider(result: dict[str, Any]) -> str:
    """Who decided in an evaluation or a benchmark, and when, in words."""
    return decides(result["policy"], _evict(result), result.get("max_rows"))


def _note(results: Results) -> str:
    """What every figure has to be read with: context length and number of tokens."""
    contexts = sorted({result["context"] for result in results})
    tokens = sorted({level["tokens"] for result in results for level in result["levels"]})
    periods = {result["policy"]: result["evicts_every"] for result in results}
    slow = [f"{policy} evicts every {n} tokens at most" for policy, n in periods.items() if n > 1]
    prompts = sorted({result["prompt"] for result in results if result.get("prompt")})
    after = f", scored after {', '.join(map(str, prompts))}" if prompts else ""
    pruned = [
        (result["policy"], _evict(result))
        for result in results
        if any(level["sparsity"] > 0 for level in result["levels"])
    ]
    return "; ".join(
        [
            f"Perplexity at context {', '.join(map(str, contexts))}{after}, "
            f"on {', '.join(f'{count:,}' for count in tokens)} tokens",
            *slow,
            *out_of_place(pruned),
        ]
    )


def _scores(results: Results) -> Table:
    """A row per level; a task has a column per metric, and its own realised sparsity."""
    levels = [level for result in results for level in result["levels"]]
    columns = list(
        dict.fromkeys(
            (task, metric)
            for level in levels
            for task, scores in level["tasks"].items()
            for metric in (*METRICS, "sparsity")
            if metric in scores
        )
    )
    header = ["model", "policy", "requested", "sparsity", "cache sparsity", "rows", "perplexity"]
    header += [f"{task} {metric}" for task, metric in columns]
    rows = []
    for result in results:
        for level in result["levels"]:
            row = [
                *_subject(result, level),
                f"{level['sparsity']:.3f}",
                f"{level['cache_sparsity']:.3f}",
                score(level, "rows"),
                f"{level['perplexity']:.2f}",
            ]
            row += [score(level["tasks"].get(task, {}), metric) for task, metric in columns]
            rows.append(row)
    return Table(header, rows, texts=2)


def _retrieved(results: Results) -> Table:
    """The cells of retrieval."""
    return retrieved(
        (_subject(result, level), level["tasks"]["retrieval"]["cells"])
        for result in results
        for level in result["levels"]
        if "retrieval" in level["tasks"]
    )


def retrieved(found: Iterable[tuple[list[str], Sequence[dict[str, Any]]]]) -> Table:
    """A row per subject (model, policy, level) and length; `found` has its cells with each."""
    every = list(found)
    depths = sorted({cell["depth"] for _, cells in every for cell in cells})
    rows = []
    for subject, cells in every:
        for length in dict.fromkeys(cell["length"] for cell in cells):
            acc = {
                cell["depth"]: f"{cell['acc']:.2f}" for cell in cells if cell["length"] == length
            }
            rows.append([*subject, f"{length}", *(acc.get(depth, "") for depth in depths)])
    header = ["model", "policy", "requested", "length", *(f"{depth:g}" for depth in depths)]
    return Table(header, rows, texts=2)


def _subject(result: dict[str, Any], level: dict[str, Any]) -> list[str]:
    """What a row is about: model, policy, and the level asked for."""
    requested = level["sparsity_requested"]
    dense = requested == 0 and level["sparsity"] == 0  # a cap on rows evicts at 0 too
    return [_model(result), "dense" if dense else decider(result), f"{requested:g}"]


def score(scores: dict[str, Any], metric: str) -> str:
    """A metric of a task, empty where it has none; accuracy with its standard error."""
    if scores.get(metric) is None:
        return ""
    if metric == "rows":
        return f"{scores[metric]:.0f}"
    if metric == "acc" and "stderr" in scores:
        return f"{scores[metric]:.3f} ± {scores['stderr']:.3f}"
    return f"{scores[metric]:.2f}" if metric == "perplexity" else f"{scores[metric]:.3f}"
