"""`ctxprune bench`: speed and memory, dense and pruned, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxprune.cli.console import data, only_data, say, write_json
from ctxprune.cli.console import out as stdout
from ctxprune.cli.options import (
    EVICTION,
    MODEL,
    OUTPUT,
    TEXT,
    Device,
    Evict,
    Json,
    MaxRows,
    Model,
    Policy,
    ResultsFile,
    Seed,
    numbers,
    settings,
    whole,
    words,
)
from ctxprune.cli.workspace import current
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import check_writable
from ctxprune.pruner.savings import MEANING

if TYPE_CHECKING:
    from ctxprune.evals.config import BenchConfig
    from ctxprune.evals.speed.training_cost import TrainingCostConfig

EXAMPLES = """
Examples:

  ctxprune bench --batch-size 1,8 --context-length 256,512 --out speed.json --plot speed.png

  ctxprune bench --model ./m --sparsity 0,0.8 --dtype float32,bfloat16 --compile

  ctxprune bench --model ./m --context-length 1024,4096 --batch-size 8 --modes dense-static,pruned

  ctxprune bench --architecture gpt2 --batch-size 32 --context-length 1024

  ctxprune bench --model ./m --unequal --json > speed.json

  ctxprune bench --training --train lora --bf16 --context-length 512,1024,2048
"""


MEASURED = "What is measured"
TRAINING = "Steps of tuning instead"


def bench(
    ctx: typer.Context,
    model: Model = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="Instead of a model: random weights of gpt2, llama or a config.json.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto (default), float32, bfloat16, float16, float64, comma-separated.",
            callback=words,
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Device = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch-size",
            help="Batch sizes, comma-separated; default: 1,8.",
            callback=whole,
            rich_help_panel=MEASURED,
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context-length",
            help="Tokens of the prompts, comma-separated; default: 512.",
            callback=whole,
            rich_help_panel=MEASURED,
        ),
    ] = None,
    unequal: Annotated[
        bool | None,
        typer.Option(
            "--unequal",
            help="Prompts from half of the context to all of it, padded.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Of dense-dynamic, dense-static, pruned, oracle; default: all.",
            callback=words,
            rich_help_panel=MEASURED,
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile",
            help="Measure steps by torch.compile beside the others.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Bursts of decode steps; default: 5.", rich_help_panel=MEASURED),
    ] = None,
    prefills: Annotated[
        int | None, typer.Option(help="Timed prefills; default: 3.", rich_help_panel=MEASURED)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Decode steps a burst, in whole eviction intervals; default: 32.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help=f"Levels, comma-separated; default: 0,0.5,0.8,0.9. A level is the {MEANING}.",
            callback=numbers,
            rich_help_panel=EVICTION,
        ),
    ] = None,
    policy: Policy = None,
    evict: Evict = None,
    max_rows: MaxRows = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text of the prompts, a file or datasets name.", rich_help_panel=TEXT),
    ] = None,
    seed: Seed = None,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Measure steps of tuning beside dense ones.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    train: Annotated[
        str | None,
        typer.Option(help="lora or full; default: full.", rich_help_panel=TRAINING),
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16", help="Autocast to bfloat16.", rich_help_panel=TRAINING),
    ] = None,
    out: ResultsFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Write a PNG here.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory of prefill and decoding, dense and pruned, side by side."""
    for path in (out, plot_file):
        if path is not None:
            check_writable(path)
    if model is not None and architecture is not None:
        raise CtxpruneError("`--model` and `--architecture` exclude each other")
    from ctxprune.evals.config import BenchConfig
    from ctxprune.evals.speed.training_cost import TrainingCostConfig

    kind, other = (
        (TrainingCostConfig, BenchConfig) if training else (BenchConfig, TrainingCostConfig)
    )
    options = settings(ctx, kind)
    if training and "batch" in options:
        if len(options["batch"]) > 1:
            raise CtxpruneError("steps of tuning are measured at one batch size")
        options["batch"] = options["batch"][0]
    for name in {*settings(ctx, other)} - {*options}:
        _refuse(ctx, name, training)
    if training and plot_file is not None:
        _refuse(ctx, "plot_file", training)
    config = kind(**options)
    folder = None if architecture is not None else current(model)
    with only_data(as_json):
        if isinstance(config, TrainingCostConfig):
            assert folder is not None
            results = _training(folder, config)
        else:
            results = _speed(folder, config, plot_file)
        if out is not None:
            write_json(out, results)
            say(f"wrote {out}")
    if as_json:
        data(results)


def _refuse(ctx: typer.Context, name: str, training: bool) -> None:
    """Raise CtxpruneError: an option that is not of what is measured."""
    flag = next(param.opts[0] for param in ctx.command.params if param.name == name)
    raise CtxpruneError(
        f"`{flag}` is nothing to {'steps of tuning' if training else 'prefill and decoding'}",
        "leave out `--training`" if training else "give `--training`, or leave it out",
    )


def _speed(folder: Path | None, config: BenchConfig, plot_file: Path | None) -> dict[str, Any]:
    """Measure prefill and decoding, and print a table."""
    from ctxprune.evals.results import Benchmark, measured
    from ctxprune.evals.speed.bench import bench as run
    from ctxprune.evals.speed.speed_report import plot, rich_table

    state = Path(".ctxprune") / "bench-state.json"
    results = run(folder, config, state=state, on_event=say)
    typed = measured(Benchmark, results)
    if plot_file is not None:
        plot(typed, plot_file)
        say(f"wrote {plot_file}")
    stdout.print(rich_table(typed))
    return results


def _training(folder: Path, config: TrainingCostConfig) -> dict[str, Any]:
    """Measure steps of tuning, and print a table."""
    from ctxprune.evals.report.tables import terminal_table
    from ctxprune.evals.results import Training, measured
    from ctxprune.evals.speed.training_cost import training_cost
    from ctxprune.evals.speed.training_report import table

    results = training_cost(folder, config, on_event=say)
    stdout.print(terminal_table(table(measured(Training, results))))
    return results
