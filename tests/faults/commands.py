"""The commands as the tables of faults run them, in a copy of the working folder `workplace`."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import ctxprune.evals.inspect.inspection
import ctxprune.evals.inspect.page
import ctxprune.evals.quality.evaluate
import ctxprune.evals.report.report_page
import ctxprune.evals.speed.bench
import ctxprune.pruner.checkpoints.export
import ctxprune.pruner.conversation
import ctxprune.pruner.training.tune  # noqa: F401 - what is imported here, no fork has to
from ctxprune.pruner.files import LOCK, OLD, TEMPORARY

WINDOWS = ("--text", "text.txt", "--max-length", "64", "--max-tokens", "256")
STEPS = ("--steps", "3", "--batch-size", "1", "--max-length", "64", "--save-every", "1")
RUN = (
    "tune",
    "--model",
    "m",
    "--sparsity",
    "0.5",
    *STEPS,
    "--data",
    "text.txt",
    "--validation-data",
    "short.txt",
)

# Each writes its output, `made`, if an option for it follows.
CONVERT = ("convert", "dense", "--rank", "8")
TUNE = RUN
EXPORT = ("export",)
EVAL = ("eval", *WINDOWS, "--sparsity", "0,0.5", "--policy", "window")
BENCH = (
    "bench",
    "--policy",
    "window",
    "--context",
    "32",
    "--batch-size",
    "1",
    "--repeats",
    "1",
    "--prefills",
    "1",
)
INSPECT = ("inspect", "--text", "text.txt", "--tokens", "64", "--policy", "window")
SHOWN = (*INSPECT, "--sparsity", "0.5")
REPORT = ("report", "results.json")
RECIPE = ("run", "recipe.yaml")
GENERATE = ("generate", "--max-new-tokens", "4", "--no-chat", "It was")
INFO = ("info",)

FOLDERS = {"convert": CONVERT, "tune": TUNE, "export": EXPORT}


def copied(workplace: Path, tmp_path: Path) -> Path:
    """A working folder to spoil."""
    place = tmp_path / "place"
    shutil.copytree(workplace, place)
    return place


def leftovers(folder: Path) -> list[str]:
    """What no command may leave behind."""
    marks = (LOCK, TEMPORARY, OLD, ".mode")
    return sorted(str(path) for path in folder.rglob("*") if path.name.endswith(marks))


def replace(name: str, with_this: object) -> None:
    """Put something in the place of what a dotted name says, for the rest of a fork."""
    mock.patch(f"ctxprune.{name}", with_this).start()
