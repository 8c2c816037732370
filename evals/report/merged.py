"""Several results of `eval` and `bench` as one: what compares with what, without repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ctxprune.evals.results import (
    LATE,
    READING,
    Benchmark,
    BenchRow,
    Cell,
    Evaluation,
    Evicted,
    Level,
    Results,
    Training,
    decides,
    listed,
)

DENSE = "dense"
# Policies whose papers evict at the end of a prompt that was read whole.
OWN_LATE = ("h2o", "knorm", "snapkv", "tova")
# Tasks that are made of the text of the evaluation: on another text they are other tasks.
OF_TEXT = (
    "fidelity",
    *("retrieval", "multi_key", "multi_value", "variable_tracking", "counting"),
    *("conversation", "last_word"),
)


Of = TypeVar("Of", bound=Results)


@dataclass(frozen=True)
class Run:
    """A result as it was written, and the files that hold it."""

    files: list[str]
    results: Results


@dataclass(frozen=True)
class Subject:
    """What is measured at several levels: a line of a figure.

    Attributes:
        policy: `DENSE` where nothing was asked to be evicted, and nothing was.
        evict: `READING` or `LATE`; the former if dense.
        max_rows: the cap, where one was asked for.
    """

    model: str
    policy: str
    evict: str
    max_rows: int | None
    dtype: str

    @property
    def decides(self) -> str:
        """Who decides what stays, from when on, and under which cap."""
        return decides(self.policy, self.evict, self.max_rows)


@dataclass(frozen=True)
class Point:
    """A subject at one level, on one text or task.

    Attributes:
        requested: the level. sparsity, rows, cache_sparsity: what was evicted: see `Evicted`.
        figures: metrics and their errors by name: `perplexity`, or what a task gives.
        not_finite: what metrics were that are no figures.
        run: the number of the run that measured it, the first one if several agree.
        chance: the accuracy of guessing. cells: of a long-context task.
    """

    subject: Subject
    requested: float
    sparsity: float
    rows: float | None
    cache_sparsity: float | None
    figures: dict[str, float]
    not_finite: dict[str, str]
    run: int = field(compare=False)
    chance: float | None = None
    cells: tuple[Cell, ...] = ()


@dataclass
class Panel:
    """Points that compare: of the same tokens of a text, or the same documents of a task.

    Attributes:
        facts: what makes them comparable, beside the name of the text or task.
        periods: how many tokens lie between two evictions at most, by policy; of all runs.
    """

    name: str
    facts: tuple[str, ...]
    points: list[Point] = field(default_factory=list)
    periods: dict[str, set[int]] = field(default_factory=dict)

    @property
    def by_request(self) -> bool:
        """Whether points compare at the level asked for, as equal rows.

        What leaves after the prompt was there for most of the queries, so the share of the tokens
        that were gone when a query looked says little.
        """
        return any(point.subject.evict == LATE for point in self.points)

    @property
    def title(self) -> str:
        """The name, and what else makes the points comparable."""
        return ", ".join((self.name, *self.facts))

    def lines(self) -> list[tuple[str, list[Point]]]:
        """Label and points of each subject, by sparsity.

        Runs of a subject make up one line, but one that measures a level again begins another.
        """
        by_run: dict[tuple[Subject, int], list[Point]] = {}
        for point in self.points:
            by_run.setdefault((point.subject, point.run), []).append(point)
        lines: list[list[Point]] = []
        for (subject, _), points in by_run.items():
            levels = {point.requested for point in points}
            for line in lines:
                if line[0].subject == subject and levels.isdisjoint(p.requested for p in line):
                    line.extend(points)
                    break
            else:
                lines.append(points)
        labels = told_apart(
            [(self._label(line[0].subject), [point.run for point in line]) for line in lines]
        )
        ordered = [sorted(line, key=lambda point: point.sparsity) for line in lines]
        return list(zip(labels, ordered, strict=True))

    def dense_of(self, point: Point, figure: str) -> float | None:
        """The figure of the same model with nothing evicted, None where it was not measured.

        Of the same run, if it did: models of the same name may be others.
        """
        wanted = (point.subject.model, point.subject.dtype)
        found = [
            other
            for other in self.points
            if other.subject.policy == DENSE
            and (other.subject.model, other.subject.dtype) == wanted
        ]
        found.sort(key=lambda other: other.run != point.run)
        return found[0].figures.get(figure) if found else None

    def note(self) -> str:
        """How often policies evict, where it is not at every token; who is not in its own way."""
        often = [
            f"{policy} evicts every {' or '.join(map(str, sorted(periods)))} tokens at most"
            for policy, periods in self.periods.items()
            if max(periods) > 1
        ]
        subjects = (point.subject for point in self.points)
        return "; ".join(often + out_of_place((one.policy, one.evict) for one in subjects))

    def _label(self, subject: Subject) -> str:
        """What the subjects of the panel differ in."""
        label = subject.decides
        if len({point.subject.model for point in self.points}) > 1:
            label += f", {subject.model}"
        if len({point.subject.dtype for point in self.points}) > 1:
            label += f", {subject.dtype}"
        return label


@dataclass
class Bench:
    """Benchmarks of one model on one machine.

    Attributes:
        parts: number and results of each run, and its rows that no run before has.
    """

    title: str
    parts: list[tuple[int, Benchmark, list[BenchRow]]] = field(default_factory=list)


@dataclass(frozen=True)
class Merged:
    """All of the results.

    Attributes:
        runs: each once, in the order given; their numbers count from 1.
        models: name that was measured -> name to show.
        subjects: all of them, in the order of tables; a dense model before what it is pruned to.
        texts, tasks, benches, trainings: what they measured, by what compares.
    """

    runs: tuple[Run, ...]
    models: dict[str, str]
    subjects: tuple[Subject, ...]
    texts: tuple[Panel, ...]
    tasks: tuple[Panel, ...]
    benches: tuple[Bench, ...]
    trainings: tuple[Training, ...]

    @property
    def evaluations(self) -> list[Evaluation]:
        """The results of all evaluations."""
        return [results for _, results in _of_kind(self.runs, Evaluation)]


def merge(contents: Iterable[tuple[str, Any]]) -> Merged:
    """Merge the contents of files: results, or lists of them as recipes leave them.

    Args:
        contents: a file's name, and what it holds, as JSON or typed already.

    Raises:
        CtxpruneError: a file holds no results, or some that are not whole.
    """
    runs = _runs(contents)
    models = short_names((run.results.model for run in runs), parts=1)
    texts, tasks = _panels(runs, models)
    subjects = _ordered([*texts, *tasks], list(models.values()))
    return Merged(
        tuple(runs),
        models,
        subjects,
        texts,
        tasks,
        _benches(runs, models),
        tuple(results for _, results in _of_kind(runs, Training)),
    )


def out_of_place(measured: Iterable[tuple[str, str]]) -> list[str]:
    """A sentence on the policies that evict at other times than their papers have it, if any.

    Args:
        measured: policies, each with its `evict`.
    """
    early = sorted({policy for policy, evict in measured if evict == READING} & {*OWN_LATE})
    if not early:
        return []
    names = ", ".join(early[:-1]) + " and " * (len(early) > 1) + early[-1]
    return [f"{names}: while reading, where the papers evict after the prompt"]


def short_names(paths: Iterable[str], parts: int) -> dict[str, str]:
    """The last parts of each path; where they would be those of another, more of them.

    No more than tell it apart: where somebody's folders are is nothing for a page.
    """
    steps = {path: [step for step in Path(path).parts if step != "/"] for path in paths}
    short: dict[str, str] = {}
    for count in range(parts, max(map(len, steps.values()), default=parts) + 1):
        tails = {path: "/".join(each[-count:]) or path for path, each in steps.items()}
        times = Counter(tails.values())
        short |= {p: tails[p] for p in steps if p not in short and times[tails[p]] == 1}
    return {path: short.get(path, path) for path in steps}


def told_apart(lines: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """Labels of lines, given with the runs of each: equal ones also say which runs they are of."""
    times = Counter(label for label, _ in lines)
    return [
        f"{label}, run {', '.join(map(str, sorted(set(runs))))}" if times[label] > 1 else label
        for label, runs in lines
    ]


def _runs(contents: Iterable[tuple[str, Any]]) -> list[Run]:
    """Every result once, in the order given."""
    runs: list[Run] = []
    for file, content in contents:
        for results in listed(file, content):
            same = next((run for run in runs if run.results == results), None)
            if same is None:
                runs.append(Run([file], results))
            elif file not in same.files:
                same.files.append(file)
    return runs


def _of_kind(runs: Sequence[Run], kind: type[Of]) -> list[tuple[int, Of]]:
    """The runs of a command, with their numbers."""
    numbered = enumerate((run.results for run in runs), start=1)
    return [(number, results) for number, results in numbered if isinstance(results, kind)]


def _panels(
    runs: Sequence[Run], models: dict[str, str]
) -> tuple[tuple[Panel, ...], tuple[Panel, ...]]:
    """Perplexity by text, context and number of tokens; tasks by name and documents."""
    names = short_names((run.results.text for run in runs), parts=2)
    texts: dict[tuple[Any, ...], Panel] = {}
    tasks: dict[tuple[Any, ...], Panel] = {}
    for number, results in _of_kind(runs, Evaluation):
        text = names[results.text] or "a text"
        for level in results.levels:
            after = (f"after {results.prompt:,}",) if results.prompt else ()
            facts = (f"context {results.context:,}", *after, f"{level.tokens:,} tokens")
            panel = texts.setdefault((text, facts), Panel(text, facts))
            subject = _subject(results, level, models)
            _add(panel, Point(subject, *_measured(level, level), level.figures, {}, number))
            if results.evicts_every and level.sparsity > 0:
                panel.periods.setdefault(results.policy, set()).add(results.evicts_every)
            for task, scores in level.tasks.items():
                about: tuple[str, ...] = ()
                about += (f"{scores.n:,} documents",) if scores.n is not None else ()
                about += (f"{scores.shots}-shot",) if scores.shots else ()
                about += ("as a chat",) if results.apply_chat_template else ()
                if task in OF_TEXT:
                    about = (text, *about)
                panel = tasks.setdefault((task, about), Panel(task, about))
                point = Point(
                    subject,
                    *_measured(level, scores),
                    scores.figures,
                    scores.not_finite,
                    number,
                    scores.chance,
                    tuple(scores.cells),
                )
                _add(panel, point)
    return tuple(texts.values()), tuple(tasks.values())


def _measured(level: Level, of: Evicted) -> tuple[float, float, float | None, float | None]:
    """The level asked for, and what was evicted of a text or a task."""
    return level.sparsity_requested, of.sparsity, of.rows, of.cache_sparsity


def _ordered(panels: Sequence[Panel], models: Sequence[str]) -> tuple[Subject, ...]:
    """All subjects, in the order that the points of each panel get too."""
    found = dict.fromkeys(point.subject for panel in panels for point in panel.points)
    subjects = sorted(found, key=lambda subject: subject.policy != DENSE)
    subjects.sort(key=lambda subject: models.index(subject.model))
    for panel in panels:
        panel.points.sort(key=lambda p: (subjects.index(p.subject), p.run, p.requested))
    return tuple(subjects)


def _subject(results: Evaluation, level: Level, models: dict[str, str]) -> Subject:
    model = models[results.model]
    if level.is_dense:
        return Subject(model, DENSE, READING, None, results.dtype)
    return Subject(model, results.policy, results.evict, results.max_rows, results.dtype)


def _add(panel: Panel, point: Point) -> None:
    if point not in panel.points:
        panel.points.append(point)


def _benches(runs: Sequence[Run], models: dict[str, str]) -> tuple[Bench, ...]:
    benches: dict[tuple[Any, ...], Bench] = {}
    for number, results in _of_kind(runs, Benchmark):
        facts = [models[results.model]]
        facts += ["random weights"] if results.random_weights else []
        facts += [f"{results.dtype} on {results.machine}", threads(results.threads)]
        facts += ["prompts of unequal lengths"] if results.unequal else []
        bench = benches.setdefault(tuple(facts), Bench(", ".join(facts)))
        # Who decides is part of a row: the same figures of another policy are no repeat.
        known = [
            row
            for _, other, rows in bench.parts
            if other.decider == results.decider
            for row in rows
        ]
        rows = [row for row in results.rows if row not in known]
        if rows:
            bench.parts.append((number, results, rows))
    return tuple(benches.values())


def threads(count: int) -> str:
    """How many threads did the work, in words."""
    return f"{count} thread{'s' * (count != 1)}"
