"""Merged results as one page: HTML with charts, or Markdown to paste into a paper or a card."""

from __future__ import annotations

import itertools
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from string import Template

from ctxprune.evals.places import without_place
from ctxprune.evals.report.charts import Chart, accuracy_chart, perplexity_chart, speed_charts
from ctxprune.evals.report.merged import DENSE, Bench, Merged, Panel, Point, Subject, threads
from ctxprune.evals.report.report import (
    LEGEND,
    gone,
    metrics_of,
    retrieved,
    score,
)
from ctxprune.evals.report.tables import Table, html_table, markdown_table
from ctxprune.evals.results import Decided, Evaluation, Origin, Training, kind_of
from ctxprune.evals.speed import speed_report, training_report
from ctxprune.pruner import words

TITLE = "What was measured"
RUN = "run"  # the column that leads to the provenance
ABOUT = ["model", "policy", "sparsity", "realised", "rows left"]
NOTES = {
    "Perplexity": (
        f"Sparsity is what was asked for; {LEGEND}. Another text, context or number of tokens is "
        "another measurement, with a table of its own."
    ),
    "Tasks": "Give or take one standard error; realised is that of the task's own requests.",
    "Speed and memory": (
        "Medians. The modes of one run took turns in one process; runs of other days compare less "
        "well."
    ),
    "Tuning": "Forward and backward passes; the optimizer costs all modes the same.",
    "Provenance": "What the results say of themselves.",
}


@dataclass(frozen=True)
class Part:
    """Part of a section: charts, tables, notes, and texts to be kept as they are."""

    title: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    verbatim: str = ""


def markdown(merged: Merged, *, level: int = 1, provenance: bool = True) -> str:
    """The tables and notes, without charts.

    Args:
        merged: what `merge` returned.
        level: of the page's heading; 0: none, for sections under a heading of another page.
        provenance: with commands, versions and dates, and which run each row is of.
    """
    lines = ["#" * level + f" {TITLE}", ""] if level else []
    head = "#" * (level + 1 if level else 3)
    for section, parts in _sections(merged, charts=False):
        if section == "Provenance" and not provenance:
            continue
        lines += [f"{head} {section}", "", NOTES[section], ""]
        for part in parts:
            lines += [f"{head}# {words.markdown(part.title)}", ""] if part.title else []
            for table in part.tables:
                lines += [f"{words.paragraph(table.title)}:", ""] if len(part.tables) > 1 else []
                lines += [markdown_table(table if provenance else _without_run(table)), ""]
            lines += [line for note in part.notes if note for line in (words.paragraph(note), "")]
            if part.verbatim:
                lines += [
                    textwrap.indent(words.terminal(part.verbatim), "    ", lambda line: True),
                    "",
                ]
    return "\n".join(lines).rstrip("\n") + "\n"


def html(merged: Merged) -> str:
    """One page that needs nothing else."""
    sections = _sections(merged, charts=True)
    body, links, tables = [], [], itertools.count(1)
    for number, (section, parts) in enumerate(sections, start=1):
        links.append(f'<li><a href="#section-{number}">{section}</a></li>')
        body.append(f'<section aria-labelledby="section-{number}">')
        body.append(
            f'<h2 id="section-{number}">{section}</h2>\n<p class="note">{NOTES[section]}</p>'
        )
        # Where a text or task has one chart, all stand together: to be looked at side by side.
        together = all(len(part.charts) < 2 for part in parts)
        body += _charts([chart for part in parts for chart in part.charts if together])
        for part in parts:
            body += [f"<h3>{words.html(part.title)}</h3>"] if part.title else []
            body += [] if together else _charts(part.charts)
            body += [html_table(table, f"table-{next(tables)}") for table in part.tables]
            body += [f'<p class="note">{words.html(note)}</p>' for note in part.notes if note]
            body += [f"<pre>{words.html(part.verbatim)}</pre>"] if part.verbatim else []
        body.append("</section>")
    header = [
        f"<h1>{TITLE}</h1>",
        f"<p>{words.html(_summary(merged))}</p>",
        f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>',
    ]
    template = files("ctxprune.evals.report").joinpath("report.html").read_text(encoding="utf-8")
    title = f"{TITLE}: {', '.join(merged.models.values())}"
    return Template(template).substitute(
        title=words.html(title), header="\n".join(header), main="\n".join(body)
    )


def _charts(charts: Sequence[Chart]) -> list[str]:
    if not charts:
        return []
    figures = [
        f"<figure><figcaption>{words.html(chart.title)}</figcaption>\n{chart.svg}\n</figure>"
        for chart in charts
    ]
    return ['<div class="charts">', *figures, "</div>"]


def _without_run(table: Table) -> Table:
    """The table without its last column, if that says which run measured a row."""
    if table.header[-1] != RUN:
        return table
    return replace(table, header=table.header[:-1], rows=[row[:-1] for row in table.rows])


def _summary(merged: Merged) -> str:
    runs = len(merged.runs)
    return (
        f"{runs} run{'s' * (runs != 1)} of {', '.join(merged.models.values())}: "
        "perplexity, tasks, speed and memory of a model that evicts tokens from its own KV cache, "
        "as far as they were measured."
    )


def _sections(merged: Merged, *, charts: bool) -> list[tuple[str, list[Part]]]:
    """Those that have something to show."""
    subjects = merged.subjects if charts else None
    texts = [
        _text(panel, subjects, f"text-{number}")
        for number, panel in enumerate(merged.texts, start=1)
    ]
    tasks = [
        _task(panel, subjects, f"task-{number}")
        for number, panel in enumerate(merged.tasks, start=1)
    ]
    benches = [
        _bench(bench, f"bench-{number}", charts)
        for number, bench in enumerate(merged.benches, start=1)
    ]
    sections = [
        ("Perplexity", texts),
        ("Tasks", tasks),
        ("Speed and memory", benches),
        ("Tuning", [_training(one, merged.models) for one in merged.trainings]),
        ("Provenance", _provenance(merged)),
    ]
    return [(title, parts) for title, parts in sections if parts]


def _text(panel: Panel, subjects: Sequence[Subject] | None, name: str) -> Part:
    header = [*ABOUT, "perplexity", "over dense", RUN]
    rows = []
    for point in panel.points:
        value, dense = point.figures["perplexity"], panel.dense_of(point, "perplexity")
        rows.append(
            [
                *_subject(point),
                *gone(point),
                f"{value:.2f}",
                f"{value / dense - 1:+.1%}" if dense and point.subject.policy != DENSE else "",
                str(point.run),
            ]
        )
    table = Table(header, rows, texts=2, title="Perplexity by level")
    chart = perplexity_chart(panel, subjects, name) if subjects else None
    return Part(panel.title, (chart,) if chart else (), (table,), (panel.note(),))


def _task(panel: Panel, subjects: Sequence[Subject] | None, name: str) -> Part:
    metrics = list(dict.fromkeys(m for p in panel.points for m in metrics_of(p)))
    rows = [
        [
            *_subject(point),
            *gone(point),
            *(score(point, metric) for metric in metrics),
            str(point.run),
        ]
        for point in panel.points
    ]
    header = [*ABOUT, *metrics, RUN]
    tables = [Table(header, rows, texts=2, title="Scores by level")]
    celled = [(_subject(point), point.cells) for point in panel.points if point.cells]
    if celled:
        tables.append(retrieved(panel.name, celled))
    chart = accuracy_chart(panel, subjects, name) if subjects else None
    return Part(panel.title, (chart,) if chart else (), tuple(tables), (panel.note(),))


def _subject(point: Point) -> list[str]:
    return [point.subject.model, point.subject.decides, f"{point.requested:g}"]


def _bench(bench: Bench, name: str, charts: bool) -> Part:
    tables: dict[str, Table] = {}
    for number, results, rows in bench.parts:
        for table in speed_report.tables(results.model_copy(update={"rows": rows})):
            first = tables.setdefault(table.title, replace(table, rows=[]))
            first.rows.extend([*row, str(number)] for row in table.rows)
    for title, table in tables.items():
        tables[title] = replace(table, header=[*table.header, RUN])
    notes = dict.fromkeys(speed_report.note(results) for _, results, _ in bench.parts)
    shown = tuple(speed_charts(bench, name)) if charts else ()
    return Part(bench.title, shown, tuple(tables.values()), tuple(notes))


def _training(results: Training, models: dict[str, str]) -> Part:
    windows = f"{results.batch} window{'s' * (results.batch != 1)} a step"
    title = f"{models[results.model]}, {results.train}, {windows}"
    if results.bf16:
        title += ", bf16"
    title += f", on {results.machine}, {threads(results.threads)}"
    return Part(title, tables=(training_report.table(results),))


def _provenance(merged: Merged) -> list[Part]:
    """A row a run, versions, and the commands."""
    header = ["number", "results of", "model", "policy", "text", "machine", "dtype", "date"]
    header += ["seed", "limit", "batch", "files"]
    rows = []
    commands: dict[str, list[int]] = {}
    versions: dict[str, list[int]] = {}
    for number, run in enumerate(merged.runs, start=1):
        results = run.results
        on = results.machine or results.device
        if results.threads is not None:
            on += f", {threads(results.threads)}"
        rows.append(
            [
                str(number),
                kind_of(results),
                merged.models[results.model],
                results.decider if isinstance(results, Decided) else "",
                without_place(results.text),
                on,
                results.dtype,
                results.date,
                *map(_shown, (results.seed, *_how_many(results))),
                ", ".join(map(without_place, run.files)),
            ]
        )
        commands.setdefault(_command(results.command), []).append(number)
        told = ", ".join(f"{name} {value}" for name, value in results.versions.items())
        versions.setdefault(told, []).append(number)
    table = Table(header, rows, texts=len(header), title="Runs")
    notes = tuple(f"{_ranges(n)}: {told}" for told, n in versions.items() if told)
    lines = [f"# {_ranges(n)}\n{command}" for command, n in commands.items() if command]
    parts = [Part("", tables=(table,), notes=notes)]
    return [*parts, Part("Commands", verbatim="\n".join(lines))] if lines else parts


def _how_many(results: Origin) -> tuple[int | None, int | str | None]:
    """The limit on documents, and the batch."""
    if isinstance(results, Evaluation):
        return results.limit, results.batch_size
    return None, results.batch if isinstance(results, Training) else None


def _command(command: str) -> str:
    """The command of a result, which may be of a version that kept absolute paths."""
    try:
        arguments = shlex.split(command)
    except ValueError:  # no command of a shell
        return without_place(command)
    shared = [without_place(argument) for argument in arguments]
    return command if shared == arguments else shlex.join(shared)


def _shown(value: int | str | None) -> str:
    return "" if value is None else f"{value}"


def _ranges(numbers: Iterable[int]) -> str:
    """Runs 1, 2, 3 and 5 as `runs 1-3, 5`."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    told = [f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups]
    return f"run{'s' * (len(told) > 1 or '-' in told[0])} {', '.join(told)}"
