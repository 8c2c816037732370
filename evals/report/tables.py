"""A table of words and figures, and its forms: Markdown, HTML, and rich for a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table as RichTable

from ctxprune.pruner import words


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
    header, *rows = ([words.markdown(cell) for cell in row] for row in (table.header, *table.rows))
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def html_table(table: Table, name: str) -> str:
    """A table that scrolls by itself where the page is narrow; `name` is its id."""
    kinds = ["" if n < table.texts else ' class="figure"' for n in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{kind}>{words.html(cell)}</th>'
        for kind, cell in zip(kinds, table.header, strict=True)
    )
    lines = [
        f'<div class="table" role="region" aria-labelledby="{name}" tabindex="0"><table>',
        f'<caption id="{name}">{words.html(table.title)}</caption>',
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
    ]
    for row in table.rows:
        cells = [f'<th scope="row">{words.html(row[0])}</th>']
        for kind, cell in zip(kinds[1:], row[1:], strict=True):
            cells.append(f"<td{kind}>{words.html(cell)}</td>")
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
