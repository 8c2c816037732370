"""Finished measurements on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctxprune.pruner.errors import CtxpruneError


class Finished:
    """A state file: digest of all that a measurement depends on -> its label and result."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._all: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            try:
                self._all = json.loads(path.read_text())
            except ValueError as error:
                raise CtxpruneError(
                    f"`{path}` is not a state file of measurements", "delete it to start afresh"
                ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The result kept under a digest, if there is one."""
        found = self._all.get(key)
        return None if found is None else found["result"]

    def put(self, key: str, label: str, result: dict[str, Any]) -> None:
        """Keep a result, on disk at once."""
        self._all[key] = {"label": label, "result": result}
        self._write()

    def drop(self, keys: Iterable[str]) -> None:
        """Forget results: the next run measures anew."""
        for key in keys:
            self._all.pop(key, None)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_name(f"{self._path.name}.partial")
            partial.write_text(json.dumps(self._all, indent=1))
            os.replace(partial, self._path)


def stats(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the files that exist: gigabytes are not read for it."""
    found = [(path, path.stat()) for path in sorted(files) if path.is_file()]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def text_stats(source: str | None) -> list[tuple[str, int, int]]:
    """`stats` of what `read_texts` reads; nothing for embedded text and names of `datasets`."""
    if source is None:
        return []
    path = Path(source)
    return stats(path.rglob("*") if path.is_dir() else [path])


def digest(value: Any) -> str:
    """A key for anything that JSON can say."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
