"""The errors a user can cause, and the one helper that names near misses.

Anything else that is raised (ValueError, KeyError ...) is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CtxpruneError(Exception):
    """A mistake of the user: one sentence on what is wrong, and a hint on what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Interrupted(CtxpruneError):
    """Work was stopped by the user and can be resumed."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def choose(kind: str, name: str, options: Iterable[str]) -> str:
    """Return `name` if it is one of `options`.

    Raises:
        CtxpruneError: naming the nearest option and all of them.
    """
    known = sorted(options)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    meant = f", did you mean `{near[0]}`?" if near else ""
    listed = ", ".join(f"`{option}`" for option in known)
    said = name if name.isprintable() else ascii(name)[1:-1]
    raise CtxpruneError(f"unknown {kind} `{said}`{meant}", f"choose from {listed}")
