"""The current model of the working folder: `convert` and `tune` note it, later commands use it."""

from __future__ import annotations

from pathlib import Path

from ctxprune.cli.console import say, write_text
from ctxprune.pruner.errors import CtxpruneError

NOTE = Path(".ctxprune") / "current"


def set_current(folder: Path) -> None:
    """Make `folder` what commands without `--model` work on, in this working folder."""
    write_text(NOTE, f"{folder}\n")


def current(model: Path | None) -> Path:
    """The folder given with `--model`, else the current one, which is then printed.

    Raises:
        CtxpruneError: none was given, and none is noted.
    """
    if model is not None:
        return model
    if not NOTE.is_file():
        raise CtxpruneError(
            "there is no current model in this folder",
            "run `ctxprune convert MODEL --out DIR` first, or give `--model DIR`",
        )
    folder = Path(NOTE.read_text(encoding="utf-8").strip())
    say(f"model: {folder}")
    return folder
