"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
