"""The `ctxprune` command: its subcommands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from ctxprune.cli import bench, convert, eval, export, generate, info, inspect, report, run, tune
from ctxprune.cli.console import fail, out, say
from ctxprune.pruner.errors import CtxpruneError, Interrupted

app = typer.Typer(
    name="ctxprune",
    help="Teach a pretrained causal LM to forget: learned eviction from its own KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for name, command, examples in (
    ("convert", convert.convert, convert.EXAMPLES),
    ("tune", tune.tune, tune.EXAMPLES),
    ("eval", eval.evaluate, eval.EXAMPLES),
    ("bench", bench.bench, bench.EXAMPLES),
    ("report", report.report, report.EXAMPLES),
    ("export", export.export, export.EXAMPLES),
    ("generate", generate.generate, generate.EXAMPLES),
    ("inspect", inspect.inspect, inspect.EXAMPLES),
    ("run", run.run, run.EXAMPLES),
    ("info", info.info, info.EXAMPLES),
):
    app.command(name, epilog=examples)(command)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"ctxprune {version('ctxprune')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def _quiet() -> None:
    """Keep the libraries from talking over our own output, unless the user asked for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler
    warnings.filterwarnings("ignore", category=FutureWarning)


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    _quiet()
    try:
        app()
    except Interrupted as error:
        fail(error)
        sys.exit(130)
    except CtxpruneError as error:
        if os.environ.get("CTXPRUNE_DEBUG"):
            raise
        fail(error)
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
