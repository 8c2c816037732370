"""Options that several commands share, and the reading of lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ctxprune.pruner.errors import CtxpruneError

Number = TypeVar("Number", int, float)

Model = Annotated[
    Path | None, typer.Option("--model", help="Model folder; default: the current one.")
]
Policy = Annotated[
    str | None,
    typer.Option(help="gate (default), window, sink, strided, h2o, tova, snapkv, knorm or random."),
]
Evict = Annotated[
    str | None,
    typer.Option(help="Rows leave while `reading` a prompt (default), or after the `prompt`."),
]
MaxRows = Annotated[
    int | None,
    typer.Option(help="Cap on the rows of a sequence in a layer; default: the model's; 0: none."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto (default: float32 on a CPU, else the checkpoint's), float32, bfloat16, "
        "float16, float64."
    ),
]
StoredDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Of the weights in the folder: auto (default: as they are, which is float32 for what "
        ".gguf files pack), bfloat16, float16, float32, float64.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="auto (default: the accelerator if there is one), cpu, cuda, cuda:1, mps."),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto: spread a model over all devices, the CPU and the disk."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to make.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]


def option(text: str, default: Any) -> Any:
    """An option whose default lives in a configuration: the help shows it all the same."""
    return typer.Option(help=f"{text}; default: {default}.")


def given(**options: Any) -> dict[str, Any]:
    """The options that were set: the others keep the defaults of their dataclass."""
    return {name: value for name, value in options.items() if value is not None}


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
