"""Options that several commands share, their panels, their old names, and the reading of lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.savings import MEANING

Number = TypeVar("Number", int, float)

# The panels of `--help`, in the order in which most commands have them.
MODEL = "Model"
EVICTION = "What is evicted"
TEXT = "Text"
SAMPLING = "Sampling"
OUTPUT = "Output"

# Names that options had before. They are understood where the new one is, and shown nowhere.
RENAMED = {
    "--accumulate": ("--gradient-accumulation-steps",),
    "--alpha": ("--entmax-alpha",),
    "--attention-bonus": ("--attention-score",),
    "--batch": ("--batch-size",),
    "--checkpointing": ("--gradient-checkpointing",),
    "--context": ("--context-length", "--max-length"),
    "--tokens": ("--max-tokens",),
    "--valid": ("--validation-data",),
}

Model = Annotated[
    Path | None,
    typer.Option("--model", help="Model folder; default: the current one.", rich_help_panel=MODEL),
]
Level = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        help=f"In [0, 1): {MEANING}; default: the tuned one.",
        rich_help_panel=EVICTION,
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="gate (default), window, sink, strided, h2o, tova, snapkv, knorm or random.",
        rich_help_panel=EVICTION,
    ),
]
Evict = Annotated[
    str | None,
    typer.Option(
        help="Rows leave while `reading` a prompt (default), or after the `prompt`.",
        rich_help_panel=EVICTION,
    ),
]
MaxRows = Annotated[
    int | None,
    typer.Option(
        help="Cap on the rows of a sequence in a layer; default: the model's; 0: none.",
        rich_help_panel=EVICTION,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto (default: float32 on a CPU, else the checkpoint's), float32, bfloat16, "
        "float16, float64.",
        rich_help_panel=MODEL,
    ),
]
StoredDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Of the weights in the folder: auto (default: as they are, which is float32 for what "
        ".gguf files pack), bfloat16, float16, float32, float64.",
        rich_help_panel=OUTPUT,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="auto (default: the accelerator if there is one), cpu, cuda, cuda:1, mps.",
        rich_help_panel=MODEL,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="auto: spread a model over all devices, the CPU and the disk.", rich_help_panel=MODEL
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to make.", rich_help_panel=OUTPUT)]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace the output folder if it exists.", rich_help_panel=OUTPUT),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of everything random.", rich_help_panel=SAMPLING),
]
System = Annotated[
    str | None,
    typer.Option(
        help="What the model is told before the first message; default: what its template says.",
        rich_help_panel=TEXT,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="String that ends a text; may be repeated.", rich_help_panel=TEXT),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 (default) is greedy; 0.8 is lively.", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Sample among so many tokens.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample among the likeliest that have this share.", rich_help_panel=SAMPLING),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON on stdout, and nothing else there.",
        rich_help_panel=OUTPUT,
    ),
]
ResultsFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write the results here, as JSON.", rich_help_panel=OUTPUT),
]


def option(text: str, default: Any, panel: str | None = None) -> Any:
    """An option whose default lives in a configuration: the help shows it all the same."""
    return typer.Option(help=f"{text}; default: {default}.", rich_help_panel=panel)


def settings(ctx: typer.Context, kind: type[Any]) -> dict[str, Any]:
    """The options of a command that were set and are fields of a configuration, by name."""
    named = {each.name: ctx.params.get(each.name) for each in dataclasses.fields(kind)}
    return {name: value for name, value in named.items() if value not in (None, [], ())}


def numbers(text: str | None) -> list[float] | None:
    """`0,0.5,0.8` as numbers.

    Raises:
        CtxpruneError: something else.
    """
    return _read(text, float, "numbers", "0,0.5,0.8")


def whole(text: str | None) -> list[int] | None:
    """`1024,2048` as whole numbers.

    Raises:
        CtxpruneError: something else.
    """
    return _read(text, int, "whole numbers", "1024,2048")


def _read(
    text: str | None, read: Callable[[str], Number], kind: str, example: str
) -> list[Number] | None:
    parts = words(text)
    try:
        return None if parts is None else [read(part) for part in parts]
    except ValueError as error:
        raise CtxpruneError(
            f"`{text}` is not a list of {kind}", f"write it like `{example}`"
        ) from error


def words(text: str | None) -> list[str] | None:
    """`a,b` as words."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
