"""Files that are written whole or not at all, and readable as any other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctxprune.pruner.errors import CtxpruneError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary file that becomes `path` if all goes well, and vanishes if not.

    Raises:
        CtxpruneError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CtxpruneError(f"`{path}` cannot be written: {error.strerror or error}") from error


def unlock(paths: Iterable[Path]) -> None:
    """Give files the mode of any new file: some libraries write for their owner alone."""
    for path in list(paths):
        new = path.with_name(f".{path.name}.{os.getpid()}.new")
        new.touch()
        mode = new.stat().st_mode
        new.unlink()
        path.chmod(mode)
