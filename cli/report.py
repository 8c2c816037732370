"""`ctxprune report`: several results as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import OUTPUT
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import check_writable, write_text

if TYPE_CHECKING:
    from ctxprune.evals.report.merged import Merged

EXAMPLES = """
Examples:

  ctxprune report gate.json sink.json speed.json --out report.html

  ctxprune report runs/demo/report.json --out report.md
"""


def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What `eval --out` and `bench --out` wrote, and report.json of `run`.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Page to write: .html with charts, or .md.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("report.html"),
) -> None:
    """Merge several results, of models, policies and levels, into one page."""
    forms = (".html", ".md")
    if out.suffix.lower() not in forms:
        raise CtxpruneError(f"`{out}` ends in neither .html nor .md", "a page is one of these")
    check_writable(out)
    merged = read(results or [])
    from ctxprune.evals.report import report_page

    page = report_page.html if out.suffix.lower() == ".html" else report_page.markdown
    write_text(out, page(merged))
    say(f"wrote {out}")


def read(paths: Sequence[Path]) -> Merged:
    """Read files of results, and merge them.

    Raises:
        CtxpruneError: there are none, or one is no JSON or holds no results.
    """
    from ctxprune.evals import results
    from ctxprune.evals.report.merged import merge

    if not paths:
        raise CtxpruneError(
            "no results were given", "give files that `eval --out` or `bench --out` wrote"
        )
    return merge([(str(path), results.read(path)) for path in paths])
