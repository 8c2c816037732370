"""Results of `bench` as rich tables, as Markdown, and as a plot."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from ctxprune.evals.report.charts import drawing
from ctxprune.evals.report.tables import Table, markdown_table
from ctxprune.evals.results import (
    DYNAMIC,
    LATE,
    ORACLE,
    STATIC,
    Benchmark,
    BenchRow,
    Breakdown,
    Range,
    Spread,
)
from ctxprune.pruner import words
from ctxprune.pruner.files import whole
from ctxprune.pruner.savings import MEANING, share_left

# What a panel shows: unit, key of a row, factor.
MEASURES = (("decoded tokens/s", "decode_tokens_per_s", 1.0), ("KV cache, MB", "kv_bytes", 1e-6))
MARKERS = "osD^vPX"
PLACE = ["mode", "batch", "context"]


def rich_table(results: Benchmark) -> Group:
    """The measurements, and under them where the time of a pruned step goes."""
    caption = f"{note(results)}. {_left(results)}".rstrip()
    return Group(*map(Fitting, tables(results)), Text(words.terminal(caption), style="dim"))


@dataclass(frozen=True)
class Fitting:
    """A table for a terminal; where it is too wide, its figures go on in tables below.

    Each of them repeats the first columns, which say what a row is of.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The tables, each as wide as it may be."""
        keys, title = list(range(len(PLACE))), self.table.title
        chosen: list[int] = []
        boundless = options.update(max_width=10_000)
        for column in range(len(PLACE), len(self.table.header)):
            wider = self._part([*keys, *chosen, column], title)
            if chosen and Measurement.get(console, boundless, wider).maximum > options.max_width:
                yield self._part([*keys, *chosen], title)
                chosen, title = [], f"{self.table.title}, continued"
            chosen.append(column)
        yield self._part([*keys, *chosen], title)

    def _part(self, columns: list[int], title: str) -> RichTable:
        form = RichTable(title=title)
        for index in columns:
            lines = self.table.header[index].replace(" ", "\n")  # narrow
            justify: JustifyMethod = "left" if index < self.table.texts else "right"
            form.add_column(lines, justify=justify, no_wrap=index >= self.table.texts)
        rows = self.table.rows
        for row, following in itertools.zip_longest(rows, rows[1:], fillvalue=()):
            same = row[1:3] == following[1:3]  # batch and context
            form.add_row(*(row[index] for index in columns), end_section=not same)
        return form


def markdown(results: Benchmark) -> str:
    """The same tables, and a note on what was measured."""
    parts = []
    for table in tables(results):
        parts += [f"{table.title}:", markdown_table(table)]
    return "\n\n".join([*parts, note(results)]) + "\n"


def plot(results: Benchmark, path: Path) -> None:
    """PNG of decode speed and cache size over the context.

    A row of panels a dtype and batch size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results.rows
    places = list(dict.fromkeys((row.dtype, row.batch) for row in rows))
    with drawing():
        figure = Figure(figsize=(11.0, 1.2 + 3.4 * len(places)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # draws to memory: no display, no global state
        panels = figure.subplots(len(places), len(MEASURES), squeeze=False)
        for (dtype, batch), line in zip(places, panels, strict=True):
            for axes, measure in zip(line, MEASURES, strict=True):
                _draw(axes, measure, dtype, batch, results)
                axes.set_title(f"batch {batch}, {words.figure(dtype)}", fontsize="medium")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
        title = textwrap.fill(
            words.line(note(results)), 150
        )  # matplotlib's wrapping knows formulas
        figure.suptitle(title, fontsize="small")
        with whole(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw(
    axes: Any, measure: tuple[str, str, float], dtype: str, batch: int, results: Benchmark
) -> None:
    """One measure over the context."""
    unit, key, factor = measure
    levels = sorted({row.sparsity for row in results.rows})
    contexts = sorted({row.context for row in results.rows})
    lines: dict[str, list[BenchRow]] = {}
    for row in results.rows:
        if (row.dtype, row.batch) == (dtype, batch) and getattr(row, key) is not None:
            lines.setdefault(label(row, results, dtype), []).append(row)
    for name, points in lines.items():
        axes.plot(
            [row.context for row in points],
            [getattr(row, key) * factor for row in points],
            label=words.figure(name),
            **_style(points[0], levels.index(points[0].sparsity)),
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)


def tables(results: Benchmark) -> list[Table]:
    """Reading and decoding, and where the time of a pruned step goes if that was measured."""
    rows = results.rows
    found = [_decode_table(rows, results)]
    if any(row.ttft_s is not None for row in rows):
        found.insert(0, _read_table(rows, results))
    if any(row.breakdown for row in rows):
        found.append(_part_table(rows, results))
    return found


def _read_table(rows: list[BenchRow], results: Benchmark) -> Table:
    """An oracle reads no prompt, so it has no row here."""
    header = [*PLACE, "sparsity", "prefill tokens/s", "first token ms", "of dense (min-max)"]
    header += ["peak MB"]
    cells = [
        [
            *_place(row, results),
            _figure(row.sparsity_realised, "{:.3f}"),
            _figure(row.prefill_tokens_per_s, "{:.0f}"),
            _figure(row.ttft_s, "{:.1f}", 1e3),
            _spread(row.ttft_ratio),
            _figure(row.peak_bytes, "{:.0f}", 1e-6),
        ]
        for row in rows
        if row.ttft_s is not None
    ]
    return Table(header, cells, texts=1, title="Reading the prompts")


def _decode_table(rows: list[BenchRow], results: Benchmark) -> Table:
    header = [*PLACE, "decode tokens/s", "step ms (min-max)", "speedup", "of oracle", "between ms"]
    header += ["eviction ms", "interval", "rows", "KV MB"]
    cells = [
        [
            *_place(row, results),
            f"{row.decode_tokens_per_s:.1f}",
            _spread(row.step_ms),
            _figure(row.speedup, "{:.2f}"),
            _figure(row.of_oracle, "{:.2f}"),
            _figure(row.between_ms, "{:.2f}"),
            _figure(row.eviction_ms, "{:.2f}"),
            _interval(row.interval),
            f"{row.rows_kept:.0f}",
            _figure(row.kv_bytes, "{:.2f}", 1e-6),
        ]
        for row in rows
    ]
    return Table(header, cells, texts=1, title="Decoding, and the KV cache")


def _part_table(rows: list[BenchRow], results: Benchmark) -> Table:
    cells = [
        [
            *_place(row, results),
            *(f"{part:.2f}" for _, part in row.breakdown),
            f"{row.step_ms.median:.2f}",
        ]
        for row in rows
        if row.breakdown
    ]
    header = [*PLACE, *Breakdown.model_fields, "step"]
    return Table(header, cells, texts=1, title="A decode step in ms")


def _place(row: BenchRow, results: Benchmark) -> list[str]:
    return [label(row, results), str(row.batch), str(row.context)]


def _figure(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else form.format(value * factor)


def _spread(values: Spread | None) -> str:
    if values is None:
        return ""
    return f"{values.median:.2f} ({values.min:.2f}-{values.max:.2f})"


def _interval(every: Range | None) -> str:
    if every is None:
        return ""
    least, most = f"{every.min:.0f}", f"{every.max:.0f}"
    return most if least == most else f"{least}-{most}"


def label(row: BenchRow, results: Benchmark, dtype: str | None = None) -> str:
    """The mode; with the level asked for, and who decides when, where something is pruned.

    The dtype too, where it is not the one of all, or the one given.
    """
    parts: list[str]
    if row.mode in (DYNAMIC, STATIC):
        parts = [row.mode]
    elif row.mode == ORACLE:
        parts = [f"oracle {row.sparsity:g}"]
    elif row.sparsity == 0.0 and not results.max_rows:
        parts = ["dense, in place"]
    else:
        parts = [f"{results.policy} {row.sparsity:g}"]
        parts += ["after the prompt"] if results.evict == LATE else []
    parts += ["compiled"] if row.compiled else []
    parts += [row.dtype] if row.dtype != (dtype or results.dtype) else []
    return ", ".join(parts)


def note(results: Benchmark) -> str:
    """What every figure has to be read with."""
    parts = [results.name]
    if results.random_weights:
        parts.append("random weights")
    if results.max_rows:
        parts.append(f"at most {results.max_rows} rows")
    if results.unequal:
        parts.append("prompts of unequal lengths")
    machine = f"{results.dtype} on {results.machine}"
    if results.extensions is not None:
        machine += f" ({' and '.join(results.extensions) or 'without AVX-512'})"
    parts.append(machine)
    parts.append(f"{results.threads} thread{'s' * (results.threads != 1)}")
    if results.evicts_every > 1:
        parts.append(f"evicts every {results.evicts_every} tokens at most")
    parts.append(
        f"medians of {results.repeats} bursts of {results.steps} steps, and of "
        f"{results.prefills} prefills"
    )
    if any(row.text_repeated for row in results.rows):
        parts.append("some prompts repeated")
    return ", ".join(parts)


def _left(results: Benchmark) -> str:
    """What a sparsity is, and the rows that it leaves, where something was pruned."""
    ends = {row.sparsity: row.cache_sparsity for row in results.rows if row.ttft_s}
    pruned = {level: gone for level, gone in ends.items() if level and gone}
    if not pruned:
        return ""
    told = [f"{level:g}: {share_left(1.0 - gone)}" for level, gone in sorted(pruned.items())]
    return f"Sparsity: {MEANING}. Rows left at the end of a prompt, at {'; at '.join(told)}."


def _style(row: BenchRow, level: int) -> dict[str, Any]:
    """A stroke a mode, a colour and a marker a level of sparsity; an oracle's is hollow.

    What is compiled is drawn thicker.
    """
    width = {"linewidth": 2.5} if row.compiled else {}
    if row.mode in (DYNAMIC, STATIC):
        dash = "-" if row.mode == DYNAMIC else ":"
        return {"color": "0.3", "linestyle": dash, "marker": "."} | width
    style = {"color": f"C{level}", "marker": MARKERS[level % len(MARKERS)]} | width
    hollow = {"linestyle": "--", "markerfacecolor": "none"}
    return style | (hollow if row.mode == ORACLE else {})
