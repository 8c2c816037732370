"""Results of `bench` as rich tables, as Markdown, and as a plot."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable

from ctxprune.evals.report.shapes import BREAKDOWN, DYNAMIC, ORACLE, STATIC
from ctxprune.evals.report.tables import Table, markdown_table

Row = dict[str, Any]

# What a panel shows: unit, key of a row, factor.
MEASURES = (("decoded tokens/s", "decode_tokens_per_s", 1.0), ("KV cache, MB", "kv_bytes", 1e-6))
MARKERS = "osD^vPX"


def rich_table(results: dict[str, Any]) -> Group:
    """The measurements, and under them where the time of a pruned step goes."""
    shown = []
    for table in tables(results):
        form = RichTable(title=table.title)
        for index, name in enumerate(table.header):
            lines = name.replace(" ", "\n")  # narrow, so that figures need no second line
            form.add_column(lines, justify="left" if index < table.texts else "right")
        for row, following in itertools.zip_longest(table.rows, table.rows[1:], fillvalue=()):
            same = row[1:3] == following[1:3]  # batch and context
            form.add_row(*row, end_section=not same)
        shown.append(form)
    shown[-1].caption = note(results)
    return Group(*shown)


def markdown(results: dict[str, Any]) -> str:
    """The same tables, and a note on what was measured."""
    parts = []
    for table in tables(results):
        parts += [f"{table.title}:", markdown_table(table)]
    return "\n\n".join([*parts, note(results)]) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """PNG of decode speed and cache size over the context: a row of panels a batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["rows"]
    batches = sorted({row["batch"] for row in rows})
    contexts = sorted({row["context"] for row in rows})
    levels = sorted({row["sparsity"] for row in rows})
    figure = Figure(figsize=(11.0, 1.2 + 3.4 * len(batches)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory: no display, no global state
    panels = figure.subplots(len(batches), len(MEASURES), squeeze=False)
    for batch, line in zip(batches, panels, strict=True):
        for axes, (unit, key, factor) in zip(line, MEASURES, strict=True):
            lines: dict[str, list[Row]] = {}
            for row in rows:
                if row["batch"] == batch:
                    lines.setdefault(label(row, results), []).append(row)
            for name, points in lines.items():
                axes.plot(
                    [row["context"] for row in points],
                    [row[key] * factor for row in points],
                    label=name,
                    **_style(points[0]["mode"], levels.index(points[0]["sparsity"])),
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, [str(context) for context in contexts])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens of context")
            axes.set_ylabel(unit)
            axes.set_title(f"batch {batch}", fontsize="medium")
            axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.suptitle(note(results), fontsize="small", wrap=True)
    figure.savefig(path, format="png")


def tables(results: dict[str, Any]) -> list[Table]:
    """Speed and memory, and where the time of a pruned step goes if that was measured."""
    rows = results["rows"]
    found = [_speed_table(rows, results)]
    if any("breakdown" in row for row in rows):
        found.append(_part_table(rows, results))
    return found


def _speed_table(rows: list[Row], results: dict[str, Any]) -> Table:
    header = ["mode", "batch", "context", "sparsity", "prefill tokens/s", "first token ms"]
    header += ["decode tokens/s", "step ms (min-max)", "speedup", "of oracle", "KV MB", "peak MB"]
    header += ["rows", "padding"]
    cells = []
    for row in rows:
        step = row["step_ms"]
        cells.append(
            [
                label(row, results),
                str(row["batch"]),
                str(row["context"]),
                _figure(row["sparsity_realised"], "{:.3f}"),
                _figure(row["prefill_tokens_per_s"], "{:.0f}"),
                _figure(row["ttft_s"], "{:.1f}", 1e3),
                f"{row['decode_tokens_per_s']:.1f}",
                f"{step['median']:.2f} ({step['min']:.2f}-{step['max']:.2f})",
                _figure(row["speedup"], "{:.2f}"),
                _figure(row["of_oracle"], "{:.2f}"),
                _figure(row["kv_bytes"], "{:.2f}", 1e-6),
                _figure(row["peak_bytes"], "{:.0f}", 1e-6),
                f"{row['rows_kept']:.0f}",
                f"{row['padding']:.2f}",
            ]
        )
    return Table(header, cells, texts=1, title="Speed and memory")


def _part_table(rows: list[Row], results: dict[str, Any]) -> Table:
    cells = [
        [
            label(row, results),
            str(row["batch"]),
            str(row["context"]),
            *(f"{row['breakdown'][part]:.2f}" for part in BREAKDOWN),
            f"{row['step_ms']['median']:.2f}",
        ]
        for row in rows
        if "breakdown" in row
    ]
    header = ["mode", "batch", "context", *BREAKDOWN, "step"]
    return Table(header, cells, texts=1, title="A decode step in ms")


def _figure(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else form.format(value * factor)


def label(row: Row, results: dict[str, Any]) -> str:
    """The mode; with the level asked for, and who decides, where something is pruned."""
    if row["mode"] in (DYNAMIC, STATIC):
        return str(row["mode"])
    if row["mode"] == ORACLE:
        return f"oracle {row['sparsity']:g}"
    if row["sparsity"] == 0.0 and not results["max_rows"]:
        return "dense, in place"
    forced = ", forced" if results["forced"] else ""
    return f"{results['policy']} {row['sparsity']:g}{forced}"


def note(results: dict[str, Any]) -> str:
    """What every figure has to be read with."""
    parts = [Path(results["model"]).name or results["model"]]
    if results["random_weights"]:
        parts.append("random weights")
    if results["forced"]:
        parts.append("survival forced at random")
    if results["max_rows"]:
        parts.append(f"at most {results['max_rows']} rows")
    parts.append(f"{results['dtype']} on {results['machine']}")
    parts.append(f"{results['threads']} thread{'s' * (results['threads'] != 1)}")
    if results["evicts_every"] > 1:
        parts.append(f"evicts every {results['evicts_every']} tokens at most")
    parts.append(
        f"medians of {results['repeats']} bursts of {results['steps']} steps, and of "
        f"{results['prefills']} prefills"
    )
    if any(row["text_repeated"] for row in results["rows"]):
        parts.append("some prompts repeated")
    return ", ".join(parts)


def _style(mode: str, level: int) -> dict[str, Any]:
    """A stroke a mode, a colour and a marker a level of sparsity; an oracle's is hollow."""
    if mode in (DYNAMIC, STATIC):
        return {"color": "0.3", "linestyle": "-" if mode == DYNAMIC else ":", "marker": "."}
    style = {"color": f"C{level}", "marker": MARKERS[level % len(MARKERS)]}
    hollow = {"linestyle": "--", "markerfacecolor": "none"}
    return style | (hollow if mode == ORACLE else {})
