"""`ctxprune convert`: add gates to a pretrained checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import Force, Out, StoredDtype, given, option
from ctxprune.cli.workspace import set_current
from ctxprune.pruner.config import PruneConfig

EXAMPLES = """
Examples:

  ctxprune convert gpt2 --out ./m

  ctxprune convert ./SmolLM2.Q4_1.gguf --out ./smol

  ctxprune convert --out ./m     (the embedded checkpoint)
"""


def convert(
    out: Out,
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, model folder or .gguf file; default: the embedded one."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Width of a gate's query and key.")] = None,
    protect_first: Annotated[
        int | None, typer.Option(help="First tokens that are never dropped.")
    ] = None,
    protect_recent: Annotated[
        int | None, typer.Option(help="Newest tokens that are never dropped.")
    ] = None,
    attention_bonus: Annotated[
        float | None,
        option(
            "Weight of the attention that a row received beside its margin",
            PruneConfig.attention_bonus,
        ),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="Cap on the rows of a sequence in a layer.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="What `tune` added to this very model: a file, a folder or a hub id; repeat it to "
            "average the weights of several, with the gates of the first."
        ),
    ] = None,
    dtype: StoredDtype = None,
    force: Force = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a hub repository run its own code.")
    ] = False,
) -> None:
    """Add gates to a pretrained checkpoint; it prunes nothing until it is tuned.

    With an adapter it is tuned already; the bonus and the cap can still be changed.
    """
    from ctxprune.pruner.checkpoints import checkpoint
    from ctxprune.pruner.checkpoints import convert as conversion

    settings = given(
        rank=rank,
        protect_first=protect_first,
        protect_recent=protect_recent,
        attention_bonus=attention_bonus,
        max_rows=max_rows,
    )
    folder: Path = conversion.convert(
        model,
        out,
        settings,
        adapter=adapter or [],
        force=force,
        trust_remote_code=trust_remote_code,
        **given(dtype=dtype),
    )
    set_current(folder)
    say(checkpoint.read_settings(folder)["layers"])
    following = "eval" if adapter else "tune --sparsity 0.8"
    say(f"wrote {folder}, now the current model; next: ctxprune {following}")
