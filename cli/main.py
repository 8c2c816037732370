"""The `ctxprune` command: its subcommands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import ctxprune
from ctxprune.cli import (
    bench,
    chat,
    convert,
    eval,
    export,
    generate,
    info,
    inspect,
    report,
    run,
    tune,
)
from ctxprune.cli.command import (
    HELP,
    INTERRUPTED,
    Command,
    Commands,
    Quiet,
    Verbose,
    hush,
    is_verbose,
)
from ctxprune.cli.console import complain, fail, mute, open_streams, out
from ctxprune.pruner.errors import CtxpruneError, Interrupted
from ctxprune.pruner.files import refusal, writing
from ctxprune.pruner.interrupts import STOPS

# The exit code of an error that is ours: `EX_SOFTWARE` of sysexits.h.
CRASHED = 70

app = typer.Typer(
    name="ctxprune",
    cls=Commands,
    help="Teach a pretrained causal LM to forget: learned eviction from its own KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
for name, command, examples in (
    ("convert", convert.convert, convert.EXAMPLES),
    ("tune", tune.tune, tune.EXAMPLES),
    ("eval", eval.evaluate, eval.EXAMPLES),
    ("bench", bench.bench, bench.EXAMPLES),
    ("report", report.report, report.EXAMPLES),
    ("export", export.export, export.EXAMPLES),
    ("generate", generate.generate, generate.EXAMPLES),
    ("chat", chat.chat, chat.EXAMPLES),
    ("inspect", inspect.inspect, inspect.EXAMPLES),
    ("run", run.run, run.EXAMPLES),
    ("info", info.info, info.EXAMPLES),
):
    app.command(name, cls=Command, epilog=examples)(command)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"ctxprune {ctxprune.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print it."),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    pass


def main() -> None:
    """Run a command.

    Exit codes: 0 done, 1 a check failed, 2 bad input, 70 a crash, 130 interrupted.
    """
    open_streams()
    hush()
    try:
        with _stoppable():
            try:
                app(prog_name="ctxprune")
            finally:
                with writing(Path("stdout")):
                    sys.stdout.flush()
    except BrokenPipeError:
        mute()
        sys.exit(INTERRUPTED)
    except Interrupted as error:
        fail(error)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        fail(Interrupted("interrupted"))
        sys.exit(INTERRUPTED)
    except Exception as error:
        told = error if isinstance(error, CtxpruneError) else refusal(error)
        if told is None:
            _crash(error)
            sys.exit(CRASHED)
        if is_verbose():
            complain(traceback.format_exc())
        fail(told)
        mute()
        sys.exit(2)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end what is inside by a KeyboardInterrupt.

    What is ignored stays so, as SIGHUP under `nohup`.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        obeyed = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, _stop) for number in obeyed}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: object) -> None:
    if number == signal.SIGINT:  # who presses it again does not want to wait
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    raise KeyboardInterrupt


def _crash(error: Exception) -> None:
    """A fault of ours: what it is, where its traceback is, and what to do with it."""
    told = traceback.format_exc()
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"error: ctxprune crashed: {type(error).__name__}{': ' * bool(first)}{first}"
    report = "this is a fault of ctxprune; report it to its repository with"
    if is_verbose():
        complain(f"{told}\n{what}\n\nhint: {report} the traceback above")
        return
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="ctxprune-",
            suffix=".log",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as log:
            log.write(f"ctxprune {ctxprune.__version__}: {' '.join(sys.argv[1:])}\n\n{told}")
    except OSError:  # a full disk may be what it crashed of
        complain(f"{told}\n{what}\n\nhint: {report} the traceback above")
        return
    complain(f"{what}\n\nhint: {report} {log.name}")


if __name__ == "__main__":
    main()
