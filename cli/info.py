"""`ctxprune info`: what a model folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ctxprune.cli.console import data, out

EXAMPLES = """
Examples:

  ctxprune info ./m

  ctxprune info ./m --json
"""


def info(
    folder: Annotated[Path, typer.Argument(help="A converted or tuned model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a folder holds: base, gates, calibration, provenance."""
    from ctxprune.pruner.checkpoints import checkpoint

    about = checkpoint.describe(folder)
    if as_json:
        data(about)
        return
    config = about["config"]
    table = Table(show_header=False)
    for name, value in (
        ("base", about["provenance"].get("base", "")),
        ("model type", about["model_type"]),
        ("layers", about["layers"] or "not noted"),
        ("parameters", f"{about['parameters']:,}"),
        ("added by the gates", f"{about['parameters_added']:,}"),
        ("tuned to sparsity", about["tuned_sparsity"] or "not tuned"),
        ("context", config["context"]),
        ("protected", f"first {config['protect_first']}, recent {config['protect_recent']}"),
        ("calibrated levels", ", ".join(f"{level:g}" for level in config["levels"]) or "none"),
    ):
        table.add_row(name, str(value))
    out.print(table)
