"""Results of `evaluate` as Markdown, as tables for a terminal, and as a plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.table import Table as RichTable

from ctxprune.evals.report.charts import BY_REQUEST, REALISED, drawing, widen
from ctxprune.evals.report.merged import Point, out_of_place
from ctxprune.evals.report.tables import Table, markdown_table, terminal_table
from ctxprune.evals.results import (
    ERROR,
    HUGE,
    LATE,
    Cell,
    Evaluation,
    Evicted,
    Level,
    Scores,
    is_error,
)
from ctxprune.pruner import words
from ctxprune.pruner.files import whole

Results = Sequence[Evaluation]

TASKS = "Tasks"
TEXT = "Perplexity of the text"
# What sparsity means, wherever a table says it.
LEGEND = (
    "realised: share of the earlier tokens that were gone when a query looked, on average; rows "
    "left: of a layer at the end of a text, and their share of its tokens, which is 1 - "
    "`compression_ratio` of kvpress"
)


class Measured(Protocol):
    """Metrics and their errors by name, and what the metrics were that are no figures."""

    @property
    def figures(self) -> Mapping[str, float]: ...  # noqa: D102

    @property
    def not_finite(self) -> Mapping[str, str]: ...  # noqa: D102


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

    with drawing():
        figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # draws to memory: no display, no global state
        axes = figure.add_subplot()
        markers = itertools.cycle("osD^vPX")
        dense: dict[str, float] = {}
        late = any(result.evict == LATE for result in results)
        for result in results:
            points = [
                (level.sparsity_requested if late else level.sparsity, level.perplexity)
                for level in result.levels
            ]
            if result.prunes:
                x, y = zip(*sorted(points), strict=True)
                label = words.figure(_label(result, results))
                axes.plot(x, y, marker=next(markers), label=label)
            for level in result.levels:
                if level.sparsity_requested == 0:
                    dense[result.name] = level.perplexity
        styles = itertools.cycle(("--", ":", "-."))
        for (model, value), style in zip(dense.items(), styles, strict=False):
            label = words.figure(f"dense, {model} ({value:.2f})")
            axes.axhline(value, color="0.35", linestyle=style, label=label)
        widen(axes, [level.perplexity for result in results for level in result.levels])
        axes.set_xlabel(BY_REQUEST if late else REALISED)
        axes.set_ylabel("perplexity")
        axes.set_title(words.line(_note(results)), fontsize="medium")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        with whole(path) as temporary:
            figure.savefig(temporary, format="png")


def _label(result: Evaluation, results: Results) -> str:
    """The policy, with the model's name where several models are compared."""
    several = len({other.name for other in results if other.prunes}) > 1
    return f"{result.decider}, {result.name}" if several else result.decider


def _note(results: Results) -> str:
    """What every figure has to be read with: context length and number of tokens."""
    contexts = sorted({result.context for result in results})
    tokens = sorted({level.tokens for result in results for level in result.levels})
    periods = {result.policy: result.evicts_every for result in results}
    slow = [f"{policy} evicts every {n} tokens at most" for policy, n in periods.items() if n > 1]
    prompts = sorted({result.prompt for result in results if result.prompt})
    after = f", scored after {', '.join(map(str, prompts))}" if prompts else ""
    pruned = [
        (result.policy, result.evict)
        for result in results
        if any(level.sparsity > 0 for level in result.levels)
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
    several = len({result.name for result in results}) > 1
    header = [*_heads(several), "realised", "rows left", "perplexity"]
    rows = []
    paired = any(level.against_dense for result in results for level in result.levels)
    for result in results:
        for level in result.levels:
            row = [*_subject(result, level, several), *gone(level), score(level, "perplexity")]
            rows.append(row + ([_over_dense(level)] if paired else []))
    return Table(header + ["over dense"] * paired, rows, 1 + several, TEXT)


def _tasks(results: Results) -> Table:
    """A row per task, metric, and level, in the order of tasks."""
    several = len({result.name for result in results}) > 1
    found: dict[tuple[str, str], list[list[str]]] = {}
    for result in results:
        for level in result.levels:
            for task, scores in level.tasks.items():
                shots = f", {scores.shots}-shot" if scores.shots else ""
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


def metrics_of(measured: Measured) -> list[str]:
    """The metrics that a task gave, all of them, in its order."""
    names = dict.fromkeys((*measured.figures, *measured.not_finite))
    return [name for name in names if not is_error(name)]


def gone(of: Evicted | Point) -> list[str]:
    """The realised sparsity, and what is left at the end of a text: rows, and their share."""
    left = "" if of.rows is None else f"{of.rows:.0f}"
    if left and of.cache_sparsity is not None:
        left += f" ({1 - of.cache_sparsity:.0%})"
    return [f"{of.sparsity:.3f}", left]


def _documents(scores: Scores) -> str:
    """How many documents were scored, and of how many."""
    n, of = scores.n, scores.documents
    return "" if n is None else f"{n:,}" if of in (None, n) else f"{n:,} of {of:,}"


def _difference(scores: Scores, metric: str) -> str:
    """How much a metric differs from the dense model's on the same documents."""
    found = scores.against_dense.get(metric)
    if found is None:
        return ""
    error = "" if found.stderr is None else f" ± {found.stderr:.3f}"
    return f"{found.difference:+.3f}{error}"


def _over_dense(level: Level) -> str:
    """How much higher the perplexity is than the dense model's, from the paired windows."""
    found = level.against_dense.get("nll")
    if found is None:
        return ""
    factor = math.exp(min(found.difference, math.log(HUGE)))
    error = "" if found.stderr is None else f" ± {factor * found.stderr:.1%}"
    return f"{factor - 1:+.1%}{error}"


def _cells(results: Results) -> list[Table]:
    """A table of the cells of each task that has some."""
    found: dict[str, list[tuple[list[str], Sequence[Cell]]]] = {}
    for result in results:
        for level in result.levels:
            for task, scores in level.tasks.items():
                if scores.cells:
                    about = _subject(result, level, True)
                    found.setdefault(task, []).append((about, scores.cells))
    return [retrieved(task, some) for task, some in found.items()]


def retrieved(task: str, found: Iterable[tuple[list[str], Sequence[Cell]]]) -> Table:
    """A row per subject (model, policy, level) and length; `found` has its cells with each."""
    every = list(found)
    depths = sorted({cell.depth for _, cells in every for cell in cells})
    rows = []
    for subject, cells in every:
        for length in dict.fromkeys(cell.length for cell in cells):
            acc = {cell.depth: f"{cell.acc:.2f}" for cell in cells if cell.length == length}
            rows.append([*subject, f"{length}", *(acc.get(depth, "") for depth in depths)])
    header = ["model", "policy", "sparsity", "length", *(f"{depth:g}" for depth in depths)]
    title = f"Accuracy of {task} by length of the prompt and depth of the first fact"
    return Table(header, rows, 2, title)


def _heads(several: bool) -> list[str]:
    """The header of what `_subject` says."""
    return ["model"] * several + ["policy", "sparsity"]


def _subject(result: Evaluation, level: Level, several: bool) -> list[str]:
    """What a row is about: the model where there are several, policy, and the level asked for."""
    about = ["dense" if level.is_dense else result.decider, f"{level.sparsity_requested:g}"]
    return [result.name] * several + about


def score(measured: Measured, metric: str) -> str:
    """A metric with its standard error, if it has one; empty where it was not measured."""
    value = measured.figures.get(metric)
    if value is None:
        return measured.not_finite.get(metric, "")
    name, comma, filtered = metric.partition(",")
    # earlier versions had an error of `acc` alone
    old = measured.figures.get("stderr") if metric == "acc" else None
    error = measured.figures.get(name + ERROR + comma + filtered, old)
    form = ".2f" if "perplexity" in metric or abs(value) >= 10 else ".3f"
    return format(value, form) + (f" ± {format(error, form)}" if error is not None else "")
