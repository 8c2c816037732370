"""Words of somebody else, as they are shown: names of files, models and tasks, and texts.

Whatever they say, it means nothing to a terminal, to Markdown, to HTML or to a figure.
"""

from __future__ import annotations

import html as markup
import re

# Controls (escape sequences begin with one), what turns the direction of all that follows, halves
# of characters, and what is no character.
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff]"
)
_BREAKS = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
_MARKDOWN = re.compile(r"[\\`*\[\]<>#|~&$]|(?<![^\W_])_|_(?![^\W_])")
# What begins a list or a rule where it begins a line.
_BEGINS = re.compile(r"^(\d*)([-+=.)])(?=\s|[-=]*$)")
# Characters of a name in a figure: more have no place there.
LONGEST = 80


def terminal(words: str) -> str:
    """A text for a terminal: what would be obeyed, or not be seen, is written as its code.

    Lines and tabs stay.
    """
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], words)


def line(words: str) -> str:
    """Words in one line."""
    return terminal(_BREAKS.sub(" ", words))


def markdown(words: str) -> str:
    """Words inside a line of Markdown, or in a cell of its tables."""
    return _MARKDOWN.sub(r"\\\g<0>", line(words).strip())


def paragraph(words: str) -> str:
    """Words that make up a paragraph of Markdown, and no list or rule."""
    return _BEGINS.sub(r"\1\\\2", markdown(words), count=1)


def html(words: str) -> str:
    """A text for an element or an attribute of HTML, lines and all."""
    return markup.escape(terminal(words))


def figure(words: str) -> str:
    """A label for matplotlib: no text is a formula, and none begins with `_`, which hides it."""
    shown = line(words)
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
    return f" {shown}" if shown.startswith("_") else shown
