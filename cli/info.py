"""`ctxprune info`: what a model folder holds, and the memory of its cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ctxprune.cli.console import data, out
from ctxprune.cli.options import Json
from ctxprune.cli.workspace import current
from ctxprune.pruner.savings import MEANING, Savings, megabytes

EXAMPLES = """
Examples:

  ctxprune info

  ctxprune info ./m --json
"""

# Tokens of a text for which the memory is told.
LENGTHS = (1024, 8192, 131_072)


def info(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A converted or tuned model folder; default: the current one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a folder holds, how it was tuned, and what its cache takes, dense and pruned."""
    chosen = current(folder)
    import torch

    from ctxprune.pruner.checkpoints import checkpoint
    from ctxprune.pruner.engine.footprint import footprints, heads_of
    from ctxprune.pruner.engine.handle import handle_of

    about = checkpoint.describe(chosen)
    handle = handle_of(checkpoint.sketch(chosen))
    decoder, config = handle.decoder, handle.config
    about["layers"] = decoder.describe()
    about["heads"] = sorted(
        {str(heads_of(each.attention, decoder.config)) for each in decoder.layers}
    )
    about["positions"] = getattr(decoder.config, "max_position_embeddings", None)
    about["memory"] = {}
    if config.tuned:
        handle.use("gate", config.tuned)
        dtype = getattr(torch, about["dtype"] or "", torch.float32)
        fit = [n for n in LENGTHS if decoder.positions is None or n <= decoder.positions]
        about["memory"] = footprints(handle, fit, dtype)
    if as_json:
        held = {n: dataclasses.asdict(savings) for n, savings in about["memory"].items()}
        data(about | {"memory": held})
        return
    table = Table(show_header=False, box=box.SIMPLE)
    for name, value in _rows(about):
        table.add_row(name, value)
    out.print(table)
    if about["memory"]:
        out.print(_memory(about["memory"], about))


def _rows(about: dict[str, Any]) -> list[tuple[str, str]]:
    """What a folder holds, by name."""
    config, tuning = about["config"], about["provenance"].get("tune")
    return [
        ("model", str(about["folder"])),
        ("base", str(about["provenance"].get("base", "unknown"))),
        ("architecture", f"{about['architecture']} ({about['model_type']})"),
        ("parameters", f"{about['parameters']:,}, and {about['parameters_added']:,} of the gates"),
        ("on disk", f"{megabytes(about['disk_bytes'])}, {about['dtype']}"),
        ("layers", about["layers"]),
        ("heads a layer", "; ".join(about["heads"])),
        ("positions", f"{about['positions']:,}" if about["positions"] else "not limited"),
        ("protected", f"first {config['protect_first']}, newest {config['protect_recent']}"),
        ("cap on rows", str(config["max_rows"] or "none")),
        ("tuned", _tuning(about, tuning) if about["tuned_sparsity"] else "no; it evicts nothing"),
        ("calibrated levels", ", ".join(f"{level:g}" for level in config["levels"]) or "none"),
    ]


def _tuning(about: dict[str, Any], told: dict[str, Any] | None) -> str:
    """How it was tuned, in words."""
    words = f"to sparsity {about['tuned_sparsity']:g} at context {about['config']['context']:,}"
    if not told:
        return words
    parts = [
        f"{key} {told[key]}" for key in ("train", "steps", "data") if told.get(key) is not None
    ]
    return f"{words}: {', '.join(parts)}" if parts else words


def _memory(held: dict[int, Savings], about: dict[str, Any]) -> Table:
    """The cache of one sequence, dense and pruned."""
    level = about["tuned_sparsity"]
    table = Table(
        title=f"KV cache of one sequence in {about['dtype']}, at sparsity {level:g}",
        caption=f"Sparsity {level:g}: {MEANING}. Rows left: at the end of the text, the mean over "
        "layers. compression_ratio: what kvpress calls the share that is gone there.",
        box=box.SIMPLE_HEAD,
    )
    for name in ("tokens", "dense", "pruned", "rows left", "share", "compression_ratio"):
        table.add_column(name, justify="right")
    for tokens, savings in held.items():
        table.add_row(
            f"{tokens:,}",
            megabytes(savings.dense_kv_bytes),
            megabytes(savings.kv_bytes),
            f"{savings.rows:,.0f}",
            f"{savings.share:.1%}",
            f"{savings.compression_ratio:.2f}",
        )
    return table
