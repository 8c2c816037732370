"""Where somebody's files are, which is nothing for a page or result that is shared."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath, PureWindowsPath

# Folders of everybody's folders.
HOMES = (("home",), ("Users",))


def without_place(text: str) -> str:
    """The text with each absolute path cut to its name: results and pages are shared.

    Args:
        text: an argument of a command, such as `/home/me/m` or `gate:0.8@/home/me/m`, or a path.
    """
    return "".join(
        PureWindowsPath(part).name or part if _is_absolute(part) else part
        for part in re.split("([=@,])", _said(text))
    )


def nearby(path: str) -> str:
    """A path as results have it: of an absolute one the last two parts, and none of whose home.

    Two, since one would make the same model of `a/tuned` and `b/tuned`.
    """
    path = _said(path)
    if not _is_absolute(path):
        return path
    kind = PurePosixPath if path.startswith(("/", "~")) else PureWindowsPath
    found, home = kind(path).parts[1:], PurePosixPath(os.path.expanduser("~")).parts[1:]
    if home and found[: len(home)] == home:
        found = found[len(home) :]
    elif found[:1] in HOMES:
        found = found[2:]
    return "/".join(found[-2:]) or "/"


def _said(name: str) -> str:
    """A name that JSON can hold: the bytes of one that is no text as their codes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _is_absolute(part: str) -> bool:
    return part.startswith(("/", "~")) or PureWindowsPath(part).is_absolute()
