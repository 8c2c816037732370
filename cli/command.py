"""What all commands have in common: `-h`, `-q`, `-v`, and the old names of options."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ctxprune.cli.console import err
from ctxprune.cli.options import RENAMED
from ctxprune.pruner.errors import Interrupted
from ctxprune.pruner.words import line

# What a command that is not understood raises: typer exports what comes of it alone.
USAGE: Any = typer.BadParameter.__base__
# The exit code of what Ctrl-C, SIGTERM or SIGHUP ended: 128 and the number of the first.
INTERRUPTED = 130
HELP = {"help_option_names": ["-h", "--help"]}
# How libraries are kept from talking over our own output.
SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "KINETO_LOG_LEVEL": "99",  # torch's profiler
}


def hush() -> None:
    """Begin as without `-q` and `-v`: our own lines are printed, those of libraries are not."""
    err.quiet = False
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)


def is_verbose() -> bool:
    """Whether `-v` was given."""
    return logging.getLogger().isEnabledFor(logging.INFO)


def _quiet(wanted: bool) -> None:
    if wanted:
        err.quiet = True


def _verbose(wanted: bool) -> None:
    """Let libraries log; they read their settings when a command imports them."""
    if not wanted:
        return
    logging.basicConfig(level=logging.INFO)
    logging.getLogger().setLevel(logging.INFO)
    warnings.resetwarnings()
    for name in SILENT:
        os.environ.pop(name, None)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "info", "HF_HUB_VERBOSITY": "info"}


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_quiet, expose_value=False, help="Print errors alone on stderr."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_verbose,
        expose_value=False,
        help="Show logs of libraries, and the traceback of an error.",
    ),
]

_common = typer.Typer(add_completion=False)


@_common.command()
def _(quiet: Quiet = False, verbose: Verbose = False) -> None: ...


class Command(TyperCommand):
    """A command that understands what all of them do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += typer.main.get_command(_common).params

    def invoke(self, ctx: Any) -> Any:
        """Run the command; typer would end an interrupted one without a word.

        Raises:
            Interrupted: by a signal.
            SystemExit: nobody reads what it prints, as behind `| head`.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted("interrupted") from stop
        except BrokenPipeError as gone:
            raise SystemExit(INTERRUPTED) from gone

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, old names of options among them."""
        known = {name for param in self.params for name in param.opts}
        end = args.index("--") if "--" in args else len(args)
        with _quoted():
            return super().parse_args(ctx, [_renamed(a, known) for a in args[:end]] + args[end:])


class Commands(TyperGroup):
    """The commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named, and its arguments."""
        with _quoted():
            return super().resolve_command(ctx, args)


@contextmanager
def _quoted() -> Iterator[None]:
    """Let a refusal say what was typed as words, whatever a terminal would make of it."""
    try:
        yield
    except USAGE as error:
        error.message = line(error.message)
        raise


def _renamed(argument: str, known: set[str]) -> str:
    """An argument with the present name of the option that it gives, if that has changed."""
    name, equals, value = argument.partition("=")
    now = next((new for new in RENAMED.get(name, ()) if new in known), None)
    return argument if name in known or now is None else f"{now}{equals}{value}"
