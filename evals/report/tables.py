"""A table of words and figures, and its forms: Markdown, HTML, and rich for a terminal."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells that are ready to be read.

    Attributes:
        texts: how many of the first columns are words; the others are figures.
        title: what it shows.
    """

    header: list[str]
    rows: list[list[str]]
    texts: int
    title: str = ""


def markdown_table(table: Table) -> str:
    """Without the title, which is for the text before it."""
    rule = ["---"] * table.texts + ["---:"] * (len(table.header) - table.texts)
    lines = [_escaped(table.header), rule, *map(_escaped, table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def html_table(table: Table, name: str) -> str:
    """A table that scrolls by itself where the page is narrow; `name` is its id."""
    kinds = ["" if n < table.texts else ' class="figure"' for n in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{kind}>{escape(cell)}</th>'
        for kind, cell in zip(kinds, table.header, strict=True)
    )
    lines = [
        f'<div class="table" role="region" aria-labelledby="{name}" tabindex="0"><table>',
        f'<caption id="{name}">{escape(table.title)}</caption>',
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
    ]
    for row in table.rows:
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        for kind, cell in zip(kinds[1:], row[1:], strict=True):
            cells.append(f"<td{kind}>{escape(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def terminal_table(table: Table, caption: str | None = None) -> RichTable:
    """For a terminal."""
    shown = RichTable(title=table.title or None, caption=caption)
    for index, name in enumerate(table.header):
        shown.add_column(name, justify="left" if index < table.texts else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def plain(text: str) -> str:
    """A text from a file that stays a text in Markdown: no tags, no new lines."""
    return re.sub(r"\s+", " ", text).replace("<", "&lt;")


def _escaped(row: list[str]) -> list[str]:
    """What neither ends a cell nor begins a tag."""
    return [plain(cell).replace("|", "\\|") for cell in row]
