"""`ctxprune export`: a self-contained folder with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import OUTPUT, Force, Model, Out, StoredDtype
from ctxprune.cli.report import read
from ctxprune.cli.workspace import current

EXAMPLES = """
Examples:

  ctxprune export --out ./release

  ctxprune eval --out results.json && ctxprune export --out ./release --results results.json

  ctxprune export --out ./release --results gate.json --results sink.json --results speed.json

  ctxprune export --out ./release --dtype bfloat16 --push-to-hub user/model
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
    dtype: StoredDtype = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Repository of the hub to send the folder to as well.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a self-contained folder: weights, gates, calibration, tokenizer, model card."""
    merged = read(results) if results else None
    folder = current(model)
    from ctxprune.pruner.checkpoints import export as exporting

    told: dict[str, Any] = {}
    if merged:
        from ctxprune.evals.report.on_card import on_card

        told = on_card(merged)
    exporting.export(
        folder,
        out,
        **told,
        force=force,
        repository=push_to_hub,
        dtype=dtype or "auto",
    )
    say(f"wrote {out}" + (f", and sent it to {push_to_hub}" if push_to_hub else ""))
