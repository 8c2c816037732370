"""The errors a user can cause, and the one helper that names near misses.

Anything else that is raised (ValueError, KeyError ...) is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Characters of somebody else's message that are repeated, at most.
LONGEST = 240
# What pyo3 makes of a panic in Rust: no `Exception`, so that nobody catches it by mistake.
PANIC = "PanicException"


class CtxpruneError(Exception):
    """A mistake of the user: one sentence on what is wrong, and a hint on what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Interrupted(CtxpruneError):
    """Work was stopped by the user and can be resumed."""


@contextmanager
def translated(message: str, hint: str = "") -> Iterator[None]:
    """Turn what a library raises over somebody's file into one sentence: the message, and why.

    It goes around calls of libraries alone: an error of our own code is no mistake of the user.

    Raises:
        CtxpruneError: in place of anything else, but for what ends the program.
    """
    try:
        yield
    except CtxpruneError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise CtxpruneError(f"{message}: {first_line(error)}", hint) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the first two if the second is the reason.

    Without a full stop, and cut where it is endless.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".")
    if not told:
        return type(error).__name__
    return told if len(told) <= LONGEST else f"{told[:LONGEST]} ..."


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
