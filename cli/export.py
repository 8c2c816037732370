"""`ctxprune export`: a self-contained folder with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import Force, Model, Out
from ctxprune.cli.workspace import current
from ctxprune.pruner.errors import CtxpruneError

EXAMPLES = """
Examples:

  ctxprune export --out ./release

  ctxprune eval --json results.json && ctxprune export --out ./release --results results.json
"""


def export(
    out: Out,
    model: Model = None,
    results: Annotated[
        Path | None, typer.Option(help="What `eval --json` wrote, for the model card.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a self-contained folder: weights, gates, calibration, tokenizer, model card."""
    measured = None
    if results is not None:
        try:
            measured = json.loads(results.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CtxpruneError(f"`{results}` cannot be read as JSON: {error}") from error
    folder = current(model)
    from ctxprune.pruner import export as exporting

    exporting.export(folder, out, force=force, results=measured)
    say(f"wrote {out}")
