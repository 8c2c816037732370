"""The page of `ctxprune inspect`: one HTML file that holds its data, and fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ctxprune.pruner import words

PLACEHOLDER = "__DATA__"
# More digits than a pixel shows are only bytes.
DIGITS = 4


def render(data: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        data: title, command, created, versions, and 1 to 4 views of L layers and n tokens: pieces
            (n); expires, dropper, attention (L, n), as in `trace.Trace`; kinds, survival.

    Raises:
        ValueError: a number is not finite.
    """
    # ASCII alone, so that no character of a text depends on an encoding, and none of the three that
    # could end the script element or be taken for a reference.
    text = json.dumps(_shown(data), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    template = files("ctxprune.evals.inspect").joinpath("inspect.html").read_text(encoding="utf-8")
    return template.replace(PLACEHOLDER, text)


def _shown(value: Any) -> Any:
    """What the page shows: figures in few digits, texts as text."""
    if isinstance(value, str):
        return words.terminal(value)
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return value
