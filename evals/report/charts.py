"""Charts of a report as SVG that stands in a page and takes its colours, by day and by night."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ctxprune.evals.report.merged import DENSE, Bench, Panel, Point, Subject, told_apart
from ctxprune.evals.results import ORACLE, BenchRow
from ctxprune.pruner import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Beyond this ratio of the worst to the best perplexity, a linear axis hides all but the worst.
LOG_AXIS_RATIO = 4.0
# Within this ratio, a range of perplexities is not blown up to the height of a chart.
LEAST_SPAN = 1.05
# Drawn with these, and shown with the page's custom properties, which know light and dark.
INK, MUTED = "#1b1f24", "#5c636b"
SERIES = ("#1f6fb4", "#c2570c", "#2a7d4f", "#8a4fbf", "#c0307a", "#0f7f8e", "#8a6116")
COLOURS = {INK: "--ink", MUTED: "--muted"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)
}
MARKERS = "osD^vPX"
# What perplexity and accuracy are drawn over.
REALISED = "realised sparsity (share of earlier tokens evicted)"
BY_REQUEST = "sparsity asked for (rows are as many in both protocols)"
DASHES = ("--", ":", "-.")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "ctxprune",  # the same results give the same page
    "font.size": 10.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "grid.color": MUTED,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
WIDTH, HEIGHT = 4.8, 3.1  # inches of the axes' part; the legend comes on top


@dataclass(frozen=True)
class Chart:
    """A figure of the page: its caption, and an `svg` element with an alternative in words."""

    title: str
    svg: str


@contextmanager
def drawing(style: Mapping[Any, Any] | None = None) -> Iterator[None]:
    """Draw with matplotlib: no text is a formula, and characters that its font lacks are no matter.

    Args:
        style: settings of matplotlib beside.
    """
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, **(style or {})}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def widen(axes: Axes, values: Sequence[float]) -> None:
    """Give perplexities a logarithmic axis where they span much."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if max(values) > LOG_AXIS_RATIO * min(values):
        axes.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")  # "60", not "6 x 10^1"
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # all would overlap
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain)


def perplexity_chart(panel: Panel, subjects: Sequence[Subject], name: str) -> Chart | None:
    """Perplexity over sparsity on one text; `subjects` keep their looks on a page."""
    return _over_sparsity(panel, subjects, name, "perplexity", "perplexity", ".2f")


def accuracy_chart(panel: Panel, subjects: Sequence[Subject], name: str) -> Chart | None:
    """Accuracy over sparsity of one task, give or take its standard error."""
    return _over_sparsity(panel, subjects, name, "acc", "accuracy", ".3f")


def _over_sparsity(
    panel: Panel, subjects: Sequence[Subject], name: str, figure: str, unit: str, form: str
) -> Chart | None:
    """A line a subject, and dense models as horizontals; None where there is nothing to draw."""
    lines = []
    for label, points in panel.lines():
        drawn = [point for point in points if figure in point.figures]
        if drawn:
            lines.append((label, drawn))
    if not lines:
        return None
    over = "requested" if panel.by_request else "sparsity"
    across = BY_REQUEST if panel.by_request else REALISED

    def draw(axes: Axes) -> None:
        dashes = itertools.cycle(DASHES)
        pruned = [subject for subject in subjects if subject.policy != DENSE]
        drawn: Counter[Subject] = Counter()
        for label, points in lines:
            subject = points[0].subject
            values = [point.figures[figure] for point in points]
            errors = [point.figures.get("stderr", 0.0) for point in points]
            if subject.policy == DENSE:
                value, error = values[0], errors[0]
                axes.axhline(value, color=MUTED, linestyle=next(dashes), label=words.figure(label))
                if figure == "acc" and error:
                    axes.axhspan(value - error, value + error, color=MUTED, alpha=0.12, linewidth=0)
                continue
            number = pruned.index(subject)
            axes.errorbar(
                [getattr(point, over) for point in points],
                values,
                yerr=errors if figure == "acc" and any(errors) else None,
                capsize=3,
                color=SERIES[number % len(SERIES)],
                marker=MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
                linestyle=("-", *DASHES)[drawn[subject] % (1 + len(DASHES))],
                markersize=5,
                label=words.figure(label),
            )
            drawn[subject] += 1
        if figure == "perplexity":
            _span(axes, [point.figures[figure] for _, points in lines for point in points])
        chances = {point.chance for _, points in lines for point in points}
        for value in sorted(chance for chance in chances if chance is not None):
            axes.axhline(value, color=MUTED, linewidth=0.8, label=f"chance ({value:g})")
        axes.set_xlim(0, 1)
        axes.set_xlabel(across)
        axes.set_ylabel(unit)

    told = "; ".join(f"{label}: {_told(points, figure, form, over)}" for label, points in lines)
    title = f"{unit.capitalize()}: {panel.title}"
    return _chart(
        title, f"{unit.capitalize()} over {across.partition(' (')[0]}. {told}.", name, draw
    )


def _span(axes: Axes, values: Sequence[float]) -> None:
    """Neither hide what is small under what is large, nor make much of next to nothing."""
    widen(axes, values)
    low, high = min(values), max(values)
    if high < LEAST_SPAN * low:
        middle = (low + high) / 2
        axes.set_ylim(middle * (1 - (LEAST_SPAN - 1) / 2), middle * (1 + (LEAST_SPAN - 1) / 2))


def _told(points: Sequence[Point], figure: str, form: str, over: str) -> str:
    """The points of a line in words."""
    if points[0].subject.policy == DENSE:
        return format(points[0].figures[figure], form)
    return ", ".join(
        f"{format(point.figures[figure], form)} at {getattr(point, over):.2f}" for point in points
    )


def speed_charts(bench: Bench, name: str) -> list[Chart]:
    """Speed and memory of one model on one machine, a chart a measure and batch size.

    Over the context, or over the batch size where the context is always the same; where both are,
    bars.
    """
    from ctxprune.evals.speed.speed_report import label  # here: it brings torch with it

    measures = (
        ("decoded tokens a second", "decode_tokens_per_s", 1.0),
        ("prompt tokens a second", "prefill_tokens_per_s", 1.0),
        ("KV cache, MB", "kv_bytes", 1e-6),
        ("peak memory, MB", "peak_bytes", 1e-6),
    )
    rows = [
        (label(row, results), number, row) for number, results, part in bench.parts for row in part
    ]
    looks = list(dict.fromkeys(label for label, _, _ in rows))
    contexts = {row.context for _, _, row in rows}
    over, fixed = ("context", "batch") if len(contexts) > 1 else ("batch", "context")
    charts: list[Chart] = []
    for unit, key, factor in measures:
        found = [line for line in rows if getattr(line[-1], key) is not None]
        for value in sorted({getattr(row, fixed) for _, _, row in found}):
            some = [line for line in found if getattr(line[-1], fixed) == value]
            element = f"{name}-{len(charts) + 1}"
            where = f"{fixed} {value:,}"
            charts.append(_speed_chart(some, looks, unit, key, factor, over, where, element))
    return charts


def _speed_chart(
    rows: list[tuple[str, int, BenchRow]],
    looks: list[str],
    unit: str,
    key: str,
    factor: float,
    over: str,
    fixed: str,
    name: str,
) -> Chart:
    def place(row: BenchRow) -> int:
        at: int = getattr(row, over)
        return at

    def value(row: BenchRow) -> float:
        return float(getattr(row, key)) * factor

    lines: list[tuple[str, list[int], list[BenchRow]]] = []
    for label, run, row in rows:
        for other, runs, line in lines:
            if other == label and place(row) not in map(place, line):
                runs.append(run)
                line.append(row)
                break
        else:
            lines.append((label, [run], [row]))
    labels = told_apart([(label, runs) for label, runs, _ in lines])
    ordered = [sorted(line, key=place) for *_, line in lines]
    numbers = [looks.index(label) for label, _, _ in lines]
    places = sorted({place(row) for *_, row in rows})
    told = "; ".join(
        f"{label}: " + ", ".join(f"{value(row):,.1f} at {place(row):,}" for row in line)
        for label, line in zip(labels, ordered, strict=True)
    )
    where = fixed if len(places) > 1 else f"{fixed}, {over} {places[0]:,}"

    def draw(axes: Axes) -> None:
        if len(places) == 1:
            colours = [_colour(n, line[0]) for n, line in zip(numbers, ordered, strict=True)]
            _bars(axes, labels, [value(line[0]) for line in ordered], colours)
            axes.set_xlabel(unit)
            figure = axes.get_figure(root=True)
            assert figure is not None
            figure.set_figheight(1.0 + 0.35 * len(labels))
            axes.grid(visible=False, axis="y")
            return
        markers = itertools.cycle(MARKERS)
        for number, label, line in zip(numbers, labels, ordered, strict=True):
            axes.plot(
                [place(row) for row in line],
                [value(row) for row in line],
                color=_colour(number, line[0]),
                linestyle="--" if line[0].mode == ORACLE else "-",
                marker=next(markers),
                markersize=5,
                label=words.figure(label),
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{at:,}" for at in places])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel("tokens of context" if over == "context" else "batch")
        axes.set_ylabel(unit)

    title = f"{unit[0].upper()}{unit[1:]}: {where}"
    return _chart(title, f"{title}. {told}.", name, draw)


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], colours: Sequence[str]
) -> None:
    """A bar a mode, with its figure at its end."""
    shown = [words.figure(label) for label in labels]
    bars = axes.barh(range(len(values)), values, tick_label=shown, color=colours, height=0.6)
    axes.bar_label(bars, fmt="{:,.1f}", padding=3)
    axes.set_xlim(0, max(values) * 1.15 or 1)
    axes.invert_yaxis()


def _colour(number: int, row: BenchRow) -> str:
    """Grey for what is only compared with: other dense caches."""
    return MUTED if row.mode.startswith("dense") else SERIES[number % len(SERIES)]


def _chart(title: str, alternative: str, name: str, draw: Callable[[Axes], None]) -> Chart:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with drawing(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)  # draws to memory: no display, no global state
        axes = figure.add_subplot()
        axes.grid(which="both")
        axes.set_axisbelow(True)
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = 2 if max(map(len, labels)) < 24 else 1
            figure.set_figheight(HEIGHT + 0.22 * math.ceil(len(labels) / columns))
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return Chart(title, _inline(drawn.getvalue(), name, alternative))


def _inline(document: str, name: str, alternative: str) -> str:
    """An SVG file as an element of a page: ids of its own, the page's colours, no namespaces."""
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):  # would be the whole page's
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            if key == "id":
                value = f"{name}-{value}"
            elif key.endswith("href"):
                value = f"#{name}-{value[1:]}"
            value = value.replace("url(#", f"url(#{name}-")
            for colour, variable in COLOURS.items():
                value = value.replace(colour, f"var({variable})")
            element.set(key.rpartition("}")[2], value)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", words.terminal(alternative))
    return ElementTree.tostring(root, encoding="unicode")
