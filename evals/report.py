"""Results of `evaluate` as Markdown, as a rich table, and as a plot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Results = Sequence[dict[str, Any]]

# Beyond this ratio of the worst to the best perplexity, a linear axis hides all but the worst.
LOG_AXIS_RATIO = 4.0
METRICS = ("acc", "acc_norm", "perplexity")
RETRIEVED = "Accuracy of retrieval by length of the prompt and depth of the fact"


def markdown(results: Results) -> str:
    """One table with a row per model, policy and level, and a note on what was measured.

    Where retrieval was measured, a table of its cells follows.
    """
    header, rows = _scores(results)
    parts = [_markdown_table(header, rows), _note(results)]
    header, rows = _retrieved(results)
    if rows:
        parts += [f"{RETRIEVED}:", _markdown_table(header, rows)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_table(results: Results) -> Table:
    """The same table for a terminal."""
    return _rich_table(*_scores(results), _note(results))


def rich_retrieval(results: Results) -> Table | None:
    """The table of retrieval's cells for a terminal, None where it was not measured."""
    header, rows = _retrieved(results)
    return _rich_table(header, rows, RETRIEVED) if rows else None


def _rich_table(header: list[str], rows: list[list[str]], caption: str) -> Table:
    table = Table(caption=caption)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def plot(results: Results, path: Path) -> None:
    """PNG of perplexity over realised sparsity: a line per policy, dense models as horizontals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory: no display, no global state
    axes = figure.add_subplot()
    markers = itertools.cycle("osD^vPX")
    dense: dict[str, float] = {}
    for result in results:
        points = [(level["sparsity"], level["perplexity"]) for level in result["levels"]]
        if any(level["sparsity_requested"] > 0 for level in result["levels"]):
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker=next(markers), label=_label(result, results))
        for level in result["levels"]:
            if level["sparsity_requested"] == 0:
                dense[_model(result)] = level["perplexity"]
    styles = itertools.cycle(("--", ":", "-."))
    for (model, value), style in zip(dense.items(), styles, strict=False):
        axes.axhline(value, color="0.35", linestyle=style, label=f"dense, {model} ({value:.2f})")
    values = [level["perplexity"] for result in results for level in result["levels"]]
    if max(values) > LOG_AXIS_RATIO * min(values):
        axes.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")  # "60", not "6 x 10^1"
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain)
    axes.set_xlabel("realised sparsity (share of earlier tokens evicted)")
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
    return result["policy"] if len(pruned) == 1 else f"{result['policy']}, {_model(result)}"


def _note(results: Results) -> str:
    """What every figure has to be read with: context length and number of tokens."""
    contexts = sorted({result["context"] for result in results})
    tokens = sorted({level["tokens"] for result in results for level in result["levels"]})
    periods = {result["policy"]: result["evicts_every"] for result in results}
    slow = [f"{policy} evicts every {n} tokens at most" for policy, n in periods.items() if n > 1]
    return "; ".join(
        [
            f"Perplexity at context {', '.join(map(str, contexts))}, "
            f"on {', '.join(f'{count:,}' for count in tokens)} tokens",
            *slow,
        ]
    )


def _scores(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows; a task has a column per metric, and its own realised sparsity."""
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
    header = ["model", "policy", "requested", "sparsity", "cache sparsity", "perplexity"]
    header += [f"{task} {metric}" for task, metric in columns]
    rows = []
    for result in results:
        for level in result["levels"]:
            row = [
                *_subject(result, level),
                f"{level['sparsity']:.3f}",
                f"{level['cache_sparsity']:.3f}",
                f"{level['perplexity']:.2f}",
            ]
            row += [_score(level["tasks"].get(task, {}), metric) for task, metric in columns]
            rows.append(row)
    return header, rows


def _retrieved(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of retrieval: a row per model, policy, level and length."""
    found = [
        (result, level, level["tasks"]["retrieval"]["cells"])
        for result in results
        for level in result["levels"]
        if "retrieval" in level["tasks"]
    ]
    depths = sorted({cell["depth"] for _, _, cells in found for cell in cells})
    header = ["model", "policy", "requested", "length", *(f"{depth:g}" for depth in depths)]
    rows = []
    for result, level, cells in found:
        for length in dict.fromkeys(cell["length"] for cell in cells):
            acc = {cell["depth"]: cell["acc"] for cell in cells if cell["length"] == length}
            rows.append(
                [*_subject(result, level), f"{length}", *(f"{acc[depth]:.2f}" for depth in depths)]
            )
    return header, rows


def _subject(result: dict[str, Any], level: dict[str, Any]) -> list[str]:
    """What a row is about: model, policy, and the level asked for."""
    requested = level["sparsity_requested"]
    return [_model(result), result["policy"] if requested > 0 else "dense", f"{requested:g}"]


def _score(scores: dict[str, Any], metric: str) -> str:
    if metric not in scores:
        return ""
    if metric == "acc" and "stderr" in scores:
        return f"{scores[metric]:.3f} ± {scores['stderr']:.3f}"
    return f"{scores[metric]:.2f}" if metric == "perplexity" else f"{scores[metric]:.3f}"
