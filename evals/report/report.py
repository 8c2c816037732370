"""Results of `evaluate` as Markdown, as tables for a terminal, and as a plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from ctxprune.evals.report.charts import BY_REQUEST, REALISED, widen
from ctxprune.evals.report.merged import LATE, READING, decides, out_of_place
from ctxprune.evals.report.tables import Table, markdown_table, terminal_table

Results = Sequence[dict[str, Any]]

TASKS = "Tasks"
TEXT = "Perplexity of the text"
# What sparsity means, wherever a table says it.
LEGEND = (
    "realised: share of the earlier tokens that were gone when a query looked, on average; rows "
    "left: of a layer at the end of a text, and their share of its tokens, which is 1 - "
    "`compression_ratio` of kvpress"
)
# What a task gives beside its metrics.
_ABOUT = ("sparsity", "rows", "cache_sparsity", "capped", "n", "documents", "shots", "chance")
_ERROR = "_stderr"


def markdown(results: Results) -> str:
    """A table of perplexities with a row per model, policy and level, and what was measured.

    Tables of all metrics of tasks, and of the cells of each long-context task, follow.
    """
    parts = [markdown_table(_texts(results)), _note(results)]
    for table in (_tasks(results), *_cells(results)):
        if table.rows:
            parts += [f"{table.title}:", markdown_table(table)]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def rich_tables(results: Results) -> list[RichTable]:
    """The same tables for a terminal."""
    others = [table for table in (_tasks(results), *_cells(results)) if table.rows]
    notes = [_note(results), *[""] * len(others)]
    notes[-1] = "; ".join(note for note in (notes[-1], LEGEND) if note)
    pairs = zip([_texts(results), *others], notes, strict=True)
    return [terminal_table(table, note) for table, note in pairs]


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


def _texts(results: Results) -> Table:
    """A row per level: what was evicted of the text, and its perplexity."""
    several = len({_model(result) for result in results}) > 1
    header = [*_heads(several), "realised", "rows left", "perplexity"]
    rows = []
    paired = any("against_dense" in level for result in results for level in result["levels"])
    for result in results:
        for level in result["levels"]:
            row = [*_subject(result, level, several), *gone(level), score(level, "perplexity")]
            rows.append(row + ([_over_dense(level)] if paired else []))
    return Table(header + ["over dense"] * paired, rows, 1 + several, TEXT)


def _tasks(results: Results) -> Table:
    """A row per task, metric, and level, in the order of tasks."""
    several = len({_model(result) for result in results}) > 1
    found: dict[tuple[str, str], list[list[str]]] = {}
    for result in results:
        for level in result["levels"]:
            for task, scores in level["tasks"].items():
                shots = f", {scores['shots']}-shot" if scores.get("shots") else ""
                for metric in metrics_of(scores):
                    row = [
                        *_subject(result, level, several),
                        *gone(scores),
                        score(scores, metric),
                        _difference(scores, metric),
                        _documents(scores),
                    ]
                    found.setdefault((task + shots, metric), []).append(row)
    header = ["task", "metric", *_heads(several), "realised", "rows left"]
    rows = [[*names, *row] for names, some in found.items() for row in some]
    return Table([*header, "value", "- dense", "n"], rows, 3 + several, TASKS)


def metrics_of(scores: Mapping[str, Any]) -> list[str]:
    """The metrics that a task gave, all of them, in its order."""
    return [
        name
        for name, value in scores.items()
        if isinstance(value, (int, float)) and name not in _ABOUT and not _is_error(name)
    ]


def _is_error(name: str) -> bool:
    return name == "stderr" or name.partition(",")[0].endswith(_ERROR)


def gone(figures: Mapping[str, Any]) -> list[str]:
    """The realised sparsity, and what is left at the end of a text: rows, and their share."""
    left = score(figures, "rows")
    if left and figures.get("cache_sparsity") is not None:
        left += f" ({1 - figures['cache_sparsity']:.0%})"
    return [f"{figures['sparsity']:.3f}", left]


def _documents(scores: Mapping[str, Any]) -> str:
    """How many documents were scored, and of how many."""
    n, of = scores.get("n"), scores.get("documents")
    return "" if n is None else f"{n:,}" if of in (None, n) else f"{n:,} of {of:,}"


def _difference(scores: Mapping[str, Any], metric: str) -> str:
    """How much a metric differs from the dense model's on the same documents."""
    found = scores.get("against_dense", {}).get(metric)
    if found is None:
        return ""
    error = f" ± {found['stderr']:.3f}" if "stderr" in found else ""
    return f"{found['difference']:+.3f}{error}"


def _over_dense(level: Mapping[str, Any]) -> str:
    """How much higher the perplexity is than the dense model's, from the paired windows."""
    found = level.get("against_dense", {}).get("nll")
    if found is None:
        return ""
    factor = math.exp(found["difference"])
    error = f" ± {factor * found['stderr']:.1%}" if "stderr" in found else ""
    return f"{factor - 1:+.1%}{error}"


def _cells(results: Results) -> list[Table]:
    """A table of the cells of each long-context task."""
    found: dict[str, list[tuple[list[str], Sequence[dict[str, Any]]]]] = {}
    for result in results:
        for level in result["levels"]:
            for task, scores in level["tasks"].items():
                if "cells" in scores:
                    about = _subject(result, level, True), scores["cells"]
                    found.setdefault(task, []).append(about)
    return [retrieved(task, some) for task, some in found.items()]


def retrieved(task: str, found: Iterable[tuple[list[str], Sequence[dict[str, Any]]]]) -> Table:
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
    header = ["model", "policy", "sparsity", "length", *(f"{depth:g}" for depth in depths)]
    title = f"Accuracy of {task} by length of the prompt and depth of the first fact"
    return Table(header, rows, 2, title)


def _heads(several: bool) -> list[str]:
    """The header of what `_subject` says."""
    return ["model"] * several + ["policy", "sparsity"]


def _subject(result: dict[str, Any], level: dict[str, Any], several: bool) -> list[str]:
    """What a row is about: the model where there are several, policy, and the level asked for."""
    requested = level["sparsity_requested"]
    dense = requested == 0 and level["sparsity"] == 0  # a cap on rows evicts at 0 too
    about = ["dense" if dense else decider(result), f"{requested:g}"]
    return [_model(result)] * several + about


def score(scores: Mapping[str, Any], metric: str) -> str:
    """A metric with its standard error, if it has one; empty where it was not measured."""
    value = scores.get(metric)
    if value is None:
        return ""
    if metric == "rows":
        return f"{value:.0f}"
    name, comma, filtered = metric.partition(",")
    # earlier versions had an error of `acc` alone
    old = scores.get("stderr") if metric == "acc" else None
    error = scores.get(name + _ERROR + comma + filtered, old)
    form = ".2f" if "perplexity" in metric or abs(value) >= 10 else ".3f"
    return format(value, form) + (f" ± {format(error, form)}" if error is not None else "")
