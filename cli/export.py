"""`ctxprune export`: a self-contained folder with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import OUTPUT, Force, Model, Out
from ctxprune.cli.report import read
from ctxprune.cli.workspace import current

EXAMPLES = """
Examples:

  ctxprune export --out ./release

  ctxprune eval --out results.json && ctxprune export --out ./release --results results.json

  ctxprune export --out ./release --results gate.json --results sink.json --results speed.json
"""


def export(
    out: Out,
    model: Model = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="What `eval --out` or `bench --out` wrote, for the card; repeatable.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a self-contained folder: weights, gates, calibration, tokenizer, model card."""
    merged = read(results) if results else None
    folder = current(model)
    from ctxprune.pruner.checkpoints import export as exporting

    alone = merged.alone if merged else None
    measured = ""
    if merged and alone is None:
        from ctxprune.evals.report.report_page import markdown

        measured = markdown(merged, level=0, provenance=False)
    exporting.export(folder, out, force=force, results=alone, measured=measured)
    say(f"wrote {out}")
