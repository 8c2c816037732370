"""The figures of each training step: a line of JSON each, in the working folder of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ctxprune.pruner.files import write_text, writing

METRICS = "metrics.jsonl"
# Where TensorBoard's own log lies, if it is asked for.
BOARD = "tensorboard"


class Metrics:
    """The log of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, step: int) -> None:
        """Open the log after `step` steps: what it has of later ones will be done again."""
        path = self._folder / METRICS
        if path.is_file():
            # The last line may be half a line.
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
            write_text(path, "".join(lines))
        else:
            write_text(path, "")

    def log(self, figures: dict[str, Any]) -> None:
        """Add a step."""
        path = self._folder / METRICS
        told = json.loads(json.dumps(figures), parse_constant=lambda _: None)  # no NaN
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")

    def copy(self, target: Path) -> None:
        """Put the logs beside the tuned model."""
        shutil.copy(self._folder / METRICS, target / METRICS)
        if (self._folder / BOARD).is_dir():
            shutil.copytree(self._folder / BOARD, target / BOARD)


def scalars(figures: dict[str, Any]) -> dict[str, float]:
    """What of a step a tracker draws over the steps."""
    left_out = ("step", "steps", "eta_s")
    return {
        name: value
        for name, value in figures.items()
        if isinstance(value, int | float) and name not in left_out
    }
