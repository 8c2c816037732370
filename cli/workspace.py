"""The current model of the working folder: `convert` and `tune` note it, later commands use it."""

from __future__ import annotations

import os
from pathlib import Path

from ctxprune.cli.console import say
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import check_writable, whole

NOTE = Path(".ctxprune") / "current"


def check_notable() -> None:
    """Raise CtxpruneError if the current model could not be noted after hours of work."""
    check_writable(NOTE)


def set_current(folder: Path) -> None:
    """Make `folder` what commands without `--model` work on, in this working folder."""
    with whole(NOTE) as temporary:
        temporary.write_bytes(os.fsencode(folder) + b"\n")


def current(model: Path | None) -> Path:
    """The folder given with `--model`, else the current one, which is then printed.

    Raises:
        CtxpruneError: none was given, and none is noted, or what is noted is no name.
    """
    if model is not None:
        return model
    if not NOTE.is_file():
        raise CtxpruneError(
            "there is no current model in this folder",
            "run `ctxprune convert MODEL --out DIR` first, or give `--model DIR`",
        )
    noted = NOTE.read_bytes().removesuffix(b"\n")
    if not noted or b"\0" in noted:
        raise CtxpruneError(f"`{NOTE}` names no folder", "delete it, or give `--model DIR`")
    folder = Path(os.fsdecode(noted))
    say(f"model: {folder}")
    return folder
