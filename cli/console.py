"""What commands print: data to stdout, everything else to stderr. No other file prints."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich import console
from rich.live import Live
from rich.text import Text

from ctxprune.pruner import words
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import write_text

# Characters of a message that are printed.
LONGEST = 500
# Bytes of a line of stdin, and characters of a text from it, at most.
MOST_READ = 2**26


class Console(console.Console):
    """A console that tells if nobody reads it, where rich ends the process."""

    def on_broken_pipe(self) -> None:
        """Go on raising BrokenPipeError."""
        raise


class Plain(Console):
    """A terminal for which a text, a cell and a title mean nothing: no markup, no escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A text as it is printed, wherever it stands."""
        return super().render_str(words.terminal(text), **options)


# In a pipe there is no width to fit: a table keeps its columns whole.
out = Plain(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)
# What `--quiet` silences, and what it does not.
err = Plain(stderr=True)
errors = Plain(stderr=True)


def say(line: str) -> None:
    """One line of what is going on."""
    err.print(words.line(line), soft_wrap=True)


def complain(text: str) -> None:
    """What went wrong; it is printed with `--quiet` too."""
    with suppress(OSError):  # nobody is there to be told, or nothing can be written
        errors.print(text, soft_wrap=True)


def open_streams() -> None:
    """See that there are stdin, stdout and stderr, and that any text can be printed.

    Where a command is started without one, the next file that it opens would be taken for it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def mute() -> None:
    """Print no more on stdout, not even what waits to be printed: it could not be."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def fail(error: CtxpruneError) -> None:
    """A mistake of the user: what is wrong, and what to do."""
    told = error.message
    if len(told) > LONGEST:  # a name of any length may be in it
        told = f"{told[: LONGEST // 2]} ... {told[-LONGEST // 2 :]}"
    complain(f"error: {told}")
    if error.hint:
        complain(f"\nhint: {error.hint}")


@contextmanager
def only_data(wanted: bool) -> Iterator[None]:
    """If it is wanted, keep stdout for `data` after it: tables and texts go to stderr."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


def read_text(enough: int = MOST_READ) -> str:
    """What stdin holds, up to the line with which there is enough of it, in characters.

    Raises:
        CtxpruneError: it is not UTF-8, or endless.
    """
    text = io.StringIO()
    for line in read_lines():
        text.write(line)
        if text.tell() > MOST_READ:
            raise _endless("stdin")
        if text.tell() > enough:
            break
    return text.getvalue()


def _endless(what: str) -> CtxpruneError:
    return CtxpruneError(f"{what} has more than {MOST_READ >> 20} MB", "give a part of it")


def read_lines() -> Iterator[str]:
    """The lines of stdin, as they come; raises as `read_text`."""
    for number, line in enumerate(iter(partial(sys.stdin.buffer.readline, MOST_READ + 1), b""), 1):
        if len(line) > MOST_READ:
            raise _endless(f"line {number} of stdin")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise CtxpruneError(
                f"line {number} of stdin is not UTF-8: {error.reason}", "convert it first"
            ) from error


def data(value: Any, indent: int | None = 2) -> None:
    """A result as JSON on stdout."""
    from ctxprune.evals.results import dumps

    sys.stdout.write(dumps(value, indent) + "\n")


def stream(text: str) -> None:
    """A piece of generated text on stdout, at once; a terminal obeys nothing in it."""
    sys.stdout.write(words.terminal(text) if sys.stdout.isatty() else text)
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
        text.append(words.terminal(piece), next(style for least, style in SHADES if share >= least))
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


def write_json(path: Path, value: Any) -> None:
    """Write a result as JSON, as `write_text` does."""
    from ctxprune.evals.results import dumps

    write_text(path, dumps(value, 2) + "\n")
