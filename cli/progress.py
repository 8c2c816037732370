"""How far tunings and evaluations are: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from ctxprune.cli.console import err, say
from ctxprune.pruner import words

if TYPE_CHECKING:
    from ctxprune.evals.quality.work import Progress

# Seconds between two lines on how far an evaluation is.
LINE_EVERY = 60.0


@contextmanager
def evaluation_progress() -> Iterator[Callable[[Progress], None]]:
    """A callback for passes of an evaluation: a bar on a terminal, a line a minute elsewhere."""
    if not err.is_terminal:
        last = time.monotonic()

        def on_pass(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY:
                last = time.monotonic()
                say(f"{progress.label}: {progress.share:.0%} of all, {progress.left} left")

        yield on_pass
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[left]} left"),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=1.0, left="", visible=False)
        yield lambda progress: bar.update(
            task,
            description=words.line(progress.label),
            completed=progress.share,
            left=progress.left,
            visible=True,
        )


@dataclass(frozen=True)
class TuningProgress:
    """Listeners of a tuning: see `tune`."""

    on_step: Callable[[dict[str, Any]], None]
    on_phase: Callable[[str], None]
    on_answers: Callable[[int, int, float], None]
    on_calibration: Callable[[int, int, float], None]


@contextmanager
def tuning_progress() -> Iterator[TuningProgress]:
    """Listeners that draw a bar on a terminal, and write a line now and then elsewhere."""
    if not err.is_terminal:
        yield TuningProgress(_step_line, say, _line("answering"), _line("calibrating"))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[figures]}"),
    )
    with Bar(*columns, console=err) as bar:
        hidden: dict[str, Any] = {"total": 1, "left": "", "figures": "", "visible": False}
        answers = bar.add_task("answering", **hidden)
        steps = bar.add_task("tuning", **hidden)
        passes = bar.add_task("calibrating", **hidden)

        def on_step(figures: dict[str, Any]) -> None:
            bar.update(
                steps,
                total=figures["steps"],
                completed=figures["step"],
                left=_left(figures["eta_s"]),
                figures=", ".join(_losses(figures)),
                visible=True,
            )

        def on_answers(done: int, total: int, seconds: float) -> None:
            bar.update(answers, total=total, completed=done, left=_left(seconds), visible=True)

        def on_calibration(done: int, total: int, seconds: float) -> None:
            bar.update(steps, left="")
            bar.update(passes, total=total, completed=done, left=_left(seconds), visible=True)

        def on_phase(line: str) -> None:
            bar.console.print(words.line(line))

        yield TuningProgress(on_step, on_phase, on_answers, on_calibration)


def _left(seconds: float) -> str:
    """A time left, in minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


def _losses(figures: dict[str, Any]) -> list[str]:
    local = figures.get("local_error")
    loss = f"loss {figures['lm_loss']:.3f}" if local is None else f"local error {local:.5f}"
    if "sparsity_hard" not in figures:
        return [loss]
    return [loss, f"sparsity {figures['sparsity_hard']:.2f} of {figures['target']:.2f}"]


def _step_line(figures: dict[str, Any]) -> None:
    if _now_and_then(figures["step"], figures["steps"]):
        rate = f"{figures['tokens_per_s']:.0f} tokens/s"
        said = [*_losses(figures), rate, _left(figures["eta_s"])]
        say(f"step {figures['step']}/{figures['steps']}: {', '.join(said)}")


def _line(what: str) -> Callable[[int, int, float], None]:
    """A listener that writes a line now and then."""

    def tell(done: int, total: int, seconds: float) -> None:
        if _now_and_then(done, total):
            say(f"{what} {done}/{total}: {_left(seconds)}")

    return tell


def _now_and_then(done: int, total: int) -> bool:
    """Whether a line is due: at the first, the last, and some twenty between them."""
    return done in (1, total) or done % max(1, total // 20) == 0
