"""Where somebody's files are, which is nothing for a page or result that is shared."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath


def without_place(text: str) -> str:
    """The text with each absolute path cut to its name: results and pages are shared.

    Args:
        text: an argument of a command, such as `/home/me/m` or `gate:0.8@/home/me/m`, or a path.
    """
    return "".join(
        PureWindowsPath(part).name or part if _is_absolute(part) else part
        for part in re.split("([=@,])", text)
    )


def _is_absolute(part: str) -> bool:
    return part.startswith(("/", "~")) or PureWindowsPath(part).is_absolute()
