"""What commands print: data to stdout, everything else to stderr. No other file prints."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import whole

if TYPE_CHECKING:
    from ctxprune.evals.quality.work import Progress

# Seconds between two lines on how far an evaluation is, where no bar can be drawn.
LINE_EVERY = 60.0
# In a pipe there is no width to fit: a table keeps its columns whole.
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)


def say(line: str) -> None:
    """One line of what is going on."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def fail(error: CtxpruneError) -> None:
    """A mistake of the user: what is wrong, and what to do."""
    say(f"error: {error.message}")
    if error.hint:
        say(f"\nhint: {error.hint}")


def data(value: Any) -> None:
    """A result as JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def stream(text: str) -> None:
    """A piece of generated text on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


# Share of the layers that hold a token, at least, and how it looks.
SHADES = ((0.5, "bold green"), (0.25, "green"), (1e-9, "yellow"), (0.0, "bright_black strike"))


def shaded(pieces: Sequence[str], shares: Sequence[float]) -> Text:
    """A text whose tokens look as much remembered as they are.

    Args:
        pieces: the tokens' texts. shares: of the layers that hold each, in [0, 1].
    """
    text = Text()
    for piece, share in zip(pieces, shares, strict=True):
        # Escapes of a terminal in the text are not for the terminal.
        plain = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
        text.append(plain, next(style for least, style in SHADES if share >= least))
    return text


def legend() -> Text:
    """What the shades of `shaded` mean."""
    text = Text("in memory: ")
    names = ("in half of the layers", "in a quarter", "in some", "forgotten")
    for (_, style), name in zip(SHADES, names, strict=True):
        text.append(name, style).append("  ")
    return text


@contextmanager
def live_memory() -> Iterator[Callable[[list[str], list[float]], None]]:
    """A callback that shows the end of a growing text, shaded, and leaves all of it at the end."""
    last: tuple[list[str], list[float]] = [], []

    def show(pieces: list[str], shares: list[float]) -> None:
        nonlocal last
        last = [*pieces], shares

    def tail() -> Text:
        lines = shaded(*last).wrap(out, out.width)
        return Text("\n").join(lines[-max(out.height - 2, 1) :])

    # Drawn a few times a second, not once a token: a long text takes its time.
    with Live(get_renderable=tail, console=out, transient=True, refresh_per_second=8):
        yield show
    out.print(shaded(*last))
    out.print(legend())


def check_writable(path: Path) -> None:
    """Raise CtxpruneError if a result could not be written there after hours of work."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CtxpruneError(f"`{path}` cannot be written", "give the path of a new file")


def write_text(path: Path, text: str) -> None:
    """Write a result file whole or not at all.

    Raises:
        CtxpruneError: it cannot be written.
    """
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def tuning_progress() -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str], None]]]:
    """Callbacks for steps and phases: a bar on a terminal, a line now and then elsewhere."""
    if not err.is_terminal:
        yield _step_line, say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=err) as bar:
        task = bar.add_task("tuning", total=1, figures="", visible=False)

        def on_step(figures: dict[str, Any]) -> None:
            bar.update(
                task,
                total=figures["steps"],
                completed=figures["step"],
                figures=_figures(figures),
                visible=True,
            )

        yield on_step, lambda line: bar.console.print(line, markup=False, highlight=False)


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
            description=progress.label,
            completed=progress.share,
            left=progress.left,
            visible=True,
        )


def _figures(figures: dict[str, Any]) -> str:
    local = figures.get("local_error")
    parts = [f"loss {figures['lm_loss']:.3f}" if local is None else f"local error {local:.5f}"]
    if "sparsity_hard" in figures:
        parts.append(
            f"target {figures['target']:.2f} soft {figures['sparsity_soft']:.2f} "
            f"hard {figures['sparsity_hard']:.2f}"
        )
    left = int(figures["eta_s"])
    parts.append(f"{figures['tokens_per_s']:.0f} tokens/s, {left // 60}:{left % 60:02d} left")
    return " | ".join(parts)


def _step_line(figures: dict[str, Any]) -> None:
    every = max(1, figures["steps"] // 20)
    if figures["step"] % every == 0 or figures["step"] in (1, figures["steps"]):
        say(f"step {figures['step']}/{figures['steps']} | {_figures(figures)}")
