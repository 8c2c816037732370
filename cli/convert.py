"""`ctxprune convert`: add gates to a pretrained checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import EVICTION, MODEL, Force, Out, StoredDtype, option, settings
from ctxprune.cli.workspace import check_notable, set_current
from ctxprune.pruner.config import PruneConfig

EXAMPLES = """
Examples:

  ctxprune convert gpt2 --out ./m

  ctxprune convert ./SmolLM2.Q4_1.gguf --out ./smol

  ctxprune convert --out ./m     (the embedded checkpoint)
"""


def convert(
    ctx: typer.Context,
    out: Out,
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, model folder or .gguf file; default: the embedded one."),
    ] = None,
    rank: Annotated[
        int | None, option("Width of a gate's query and key", PruneConfig.rank, EVICTION)
    ] = None,
    protect_first: Annotated[
        int | None,
        option("First tokens that are never evicted", PruneConfig.protect_first, EVICTION),
    ] = None,
    protect_recent: Annotated[
        int | None,
        option("Newest tokens that are never evicted", PruneConfig.protect_recent, EVICTION),
    ] = None,
    attention_bonus: Annotated[
        float | None,
        typer.Option(
            "--attention-score",
            help="Weight of the attention that a row received, beside the gate's margin; "
            f"default: {PruneConfig.attention_bonus}.",
            rich_help_panel=EVICTION,
        ),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(
            help="Cap on the rows of a sequence in a layer; default: none.",
            rich_help_panel=EVICTION,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="What `tune` added to this very model: a file, a folder, the name of a shipped "
            "one or a hub id; repeat it to average the weights of several, with the gates of the "
            "first.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    gates_only: Annotated[
        bool,
        typer.Option(
            "--gates-only",
            help="Take the gates of the adapter, and leave its LoRA out: the weights stay as they "
            "are. Then calibrate anew: tune --train gates --steps 0.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    dtype: StoredDtype = None,
    force: Force = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let a hub repository or a folder run its own code.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Take weights that hold NaN or infinity, where the model never uses them.",
            rich_help_panel=MODEL,
        ),
    ] = False,
) -> None:
    """Add gates to a pretrained checkpoint; it prunes nothing until it is tuned.

    With an adapter it is tuned already; the attention score and the cap can still be changed.
    """
    from ctxprune.pruner.checkpoints import checkpoint
    from ctxprune.pruner.checkpoints import convert as conversion

    check_notable()
    folder: Path = conversion.convert(
        model,
        out,
        settings(ctx, PruneConfig),
        adapter=adapter or [],
        gates_only=gates_only,
        force=force,
        trust_remote_code=trust_remote_code,
        allow_non_finite=allow_nonfinite,
        on_event=say,
        dtype=dtype or "auto",
    )
    set_current(folder)
    say(checkpoint.read_settings(folder).layers)
    following = "eval" if adapter else "tune --sparsity 0.8"
    say(f"wrote {folder}, now the current model; next: ctxprune {following}")
