"""The figures of each training step: a line of JSON each, and TensorBoard's if it is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
BOARD = "tensorboard"


class Metrics:
    """The log of a run, in its working folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._board: Any = None

    def begin(self, step: int) -> None:
        """Open the log after `step` steps: what it has of later ones will be done again."""
        path = self._folder / METRICS
        if path.is_file():
            # The last line may be half a line.
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
            path.write_text("".join(lines), encoding="utf-8")
        else:
            path.touch()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        writer: Any = SummaryWriter
        self._board = writer(str(self._folder / BOARD), purge_step=step + 1)

    def log(self, figures: dict[str, Any]) -> None:
        """Add a step: its number is `figures["step"]`."""
        with (self._folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, int | float) and name not in ("step", "steps"):
                    self._board.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        """See that all is on disk."""
        if self._board is not None:
            self._board.close()

    def copy(self, target: Path) -> None:
        """Put the log beside the tuned model."""
        shutil.copy(self._folder / METRICS, target / METRICS)
        if (self._folder / BOARD).is_dir():
            shutil.copytree(self._folder / BOARD, target / BOARD)
