"""`ctxprune inspect`: what a model keeps of a text, what it drops, when and for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import data, legend, only_data, read_text, say, shaded
from ctxprune.cli.console import out as stdout
from ctxprune.cli.options import (
    EVICTION,
    OUTPUT,
    TEXT,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Level,
    Model,
    Policy,
    Seed,
    settings,
)
from ctxprune.cli.workspace import current
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import check_writable, write_text

EXAMPLES = """
Examples:

  ctxprune inspect --text letter.txt --out report.html

  ctxprune inspect --compare gate:0.8 --compare sink:0.8 --tokens 2000 --out report.html

  ctxprune inspect --compare gate:0.8@./before --compare gate:0.8@./after --png figures

  cat prompt.txt | ctxprune inspect --text - --sparsity 0.9 --terminal
"""

# No tokenizer makes fewer tokens of an ordinary text than one in so many characters.
CHARACTERS = 32


def inspect(
    ctx: typer.Context,
    model: Model = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="File to read, - for stdin, or a datasets name; default: a sample.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the text, at most; default: 1000.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    sparsity: Level = None,
    policy: Policy = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="POLICY:SPARSITY, or POLICY:SPARSITY@MODEL; repeat it for views side by side.",
            rich_help_panel=EVICTION,
        ),
    ] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the page here.", rich_help_panel=OUTPUT),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Draw figures into this folder.", rich_help_panel=OUTPUT),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the traces into this folder, as safetensors.", rich_help_panel=OUTPUT
        ),
    ] = None,
    terminal: Annotated[
        bool,
        typer.Option(
            "--terminal",
            help="Print the coloured text; so it is if nothing else is asked for.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a model still remembers of a text, token by token and layer by layer."""
    if compare and (policy is not None or sparsity is not None):
        raise CtxpruneError(
            "--compare already says the policies and levels", "leave out --policy and --sparsity"
        )
    for path in (out, png and png / "life.png", save and save / "1.safetensors"):
        if path is not None:
            check_writable(path)
    from ctxprune.evals.inspect.inspection import InspectConfig, Subject, page_data, rich_kinds
    from ctxprune.evals.inspect.inspection import inspect as run
    from ctxprune.evals.inspect.kinds import missing
    from ctxprune.pruner.checkpoints.checkpoint import check_folder

    subjects = [Subject.parse(each) for each in compare or ()]
    config = InspectConfig(
        subjects=tuple(subjects) or (Subject(policy=policy or "gate", sparsity=sparsity),),
        **settings(ctx, InspectConfig),
    )
    folder = current(model)
    for subject in config.subjects:
        check_folder(subject.model or folder)
    views = run(folder, _read(text, config.tokens), config, on_event=say)
    note = missing()
    if note is not None:
        say(note)
    told = page_data(views, f"What {views[0].trace.model} remembers")
    if out is not None:
        from ctxprune.evals.inspect.page import render

        write_text(out, render(told))
        say(f"wrote {out}")
    if png is not None:
        from ctxprune.evals.inspect.figures import draw

        say(f"wrote {', '.join(map(str, draw(views, png)))}")
    if save is not None:
        for number, view in enumerate(views, start=1):
            view.trace.save(save / f"{number}-{view.trace.policy}.safetensors")
        say(f"wrote {len(views)} traces into {save}")
    if terminal or not (out or as_json or png or save):
        with only_data(as_json):
            for view in views:
                stdout.rule(view.label)
                shares = view.trace.visible(view.trace.tokens - 1).double().mean(dim=0)
                stdout.print(shaded(view.trace.pieces, shares.tolist()))
            stdout.print(legend())
            stdout.print(rich_kinds(views))
    if as_json:
        data(told, indent=None)


def _read(source: str | None, tokens: int) -> str:
    """As much of a text as so many tokens may take."""
    if source == "-":
        return read_text(CHARACTERS * tokens)[: CHARACTERS * tokens]
    from ctxprune.pruner.data import read_texts

    read = ""
    for document in read_texts(source, "eval"):
        read += ("\n\n" if read else "") + document
        if len(read) > CHARACTERS * tokens:
            break
    return read[: CHARACTERS * tokens]
