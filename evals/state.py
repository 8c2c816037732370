"""Finished measurements on disk, so that a killed run goes on where it was.

A measurement is kept for as long as nothing has changed that its numbers depend on: question,
model, files, versions of libraries, and our own code.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ctxprune import pruner
from ctxprune.evals import quality
from ctxprune.evals.results import Part, checked, dumps, load_json
from ctxprune.pruner.errors import Interrupted
from ctxprune.pruner.files import claimed, write_text

PRUNER, QUALITY = (Path(package.__path__[0]) for package in (pruner, quality))
AFRESH = "delete it to start afresh"


class Kept(Part):
    """A result, what was measured, and the date (UTC) on which it was."""

    label: str
    date: str
    result: dict[str, Any]


class Finished:
    """A state file: digest of all that a measurement depends on -> its label, result and date.

    Args:
        path: None: nothing is kept on disk.

    Raises:
        CtxpruneError: there is something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._all: dict[str, Kept] = {}
        if path is not None and path.exists():
            self._all = checked(dict[str, Kept], load_json(path, AFRESH), self._what, AFRESH)

    @classmethod
    @contextmanager
    def opened(cls, path: Path | None) -> Iterator[Finished]:
        """A state file that no other process writes in the meantime.

        Raises:
            CtxpruneError: another process does, it cannot be written, or it is something else.
            Interrupted: after Ctrl-C or SIGTERM; what was measured is kept.
        """
        with nullcontext() if path is None else claimed(path):
            finished = cls(path)
            try:
                yield finished
            except KeyboardInterrupt as stop:
                if not finished._all:
                    raise
                raise Interrupted(
                    "interrupted; finished measurements are kept", "repeat the command to go on"
                ) from stop

    def get(self, key: str, kind: type[Part]) -> Kept | None:
        """What is kept under a digest, if there is anything.

        Args:
            kind: what is read of the result.

        Raises:
            CtxpruneError: it is damaged.
        """
        found = self._all.get(key)
        if found is not None:
            checked(kind, found.result, self._what, AFRESH)
        return found

    @property
    def _what(self) -> str:
        return f"the state of measurements in `{self._path}` has"

    def put(self, key: str, label: str, result: dict[str, Any]) -> Kept:
        """Keep a result that was measured now, on disk at once."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._all[key] = kept = Kept(label=label, date=now, result=result)
        self._write()
        return kept

    def drop(self, keys: Iterable[str]) -> None:
        """Forget results: the next run measures anew."""
        for key in keys:
            self._all.pop(key, None)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            kept = {key: each.model_dump() for key, each in self._all.items()}
            write_text(self._path, dumps(kept))


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


def code(policy: str | None) -> str:
    """A digest of the sources that a number depends on.

    Args:
        policy: that decides, None if nothing is evicted: the files of the others do not matter.
    """
    policies = PRUNER / "policies"
    others = {path for path in policies.glob("*.py") if path.stem not in ("__init__", policy)}
    found = hashlib.sha256()
    for path in sorted({*PRUNER.rglob("*.py"), *QUALITY.rglob("*.py")} - others):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def digest(value: Any) -> str:
    """A key for anything that JSON can say."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()
