"""`ctxprune bench`: speed and memory, dense and pruned, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxprune.cli.console import check_writable, say, write_text
from ctxprune.cli.console import out as stdout
from ctxprune.cli.options import Device, Evict, MaxRows, Model, Policy, Seed, given, numbers, words
from ctxprune.cli.workspace import current
from ctxprune.pruner.errors import CtxpruneError

EXAMPLES = """
Examples:

  ctxprune bench --batch 1,8 --context 256,512 --json speed.json --plot speed.png

  ctxprune bench --model ./m --sparsity 0,0.8 --dtype float32,bfloat16 --compile

  ctxprune bench --model ./m --context 1024,4096 --batch 8 --unequal --modes dense-static,pruned

  ctxprune bench --architecture gpt2 --batch 32 --context 1024

  ctxprune bench --training --train lora --bf16 --context 512,1024,2048
"""


def bench(
    model: Model = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="Instead of a model: random weights of gpt2, llama or a config.json."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes, comma-separated; default: 1,8.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens of context, comma-separated; default: 512.")
    ] = None,
    unequal: Annotated[
        bool | None,
        typer.Option("--unequal", help="Prompts from half of the context to all of it, padded."),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Levels, comma-separated; default: 0,0.5,0.8,0.9.")
    ] = None,
    policy: Policy = None,
    modes: Annotated[
        str | None,
        typer.Option(help="Of dense-dynamic, dense-static, pruned, oracle; default: all."),
    ] = None,
    evict: Evict = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile", help="Measure steps by torch.compile beside the others."),
    ] = None,
    max_rows: MaxRows = None,
    repeats: Annotated[int | None, typer.Option(help="Bursts of decode steps; default: 5.")] = None,
    prefills: Annotated[int | None, typer.Option(help="Timed prefills; default: 3.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Decode steps a burst, in whole eviction intervals; default: 32."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text of the prompts, a file or datasets name.")
    ] = None,
    training: Annotated[
        bool,
        typer.Option("--training", help="Measure steps of tuning beside dense ones instead."),
    ] = False,
    train: Annotated[
        str | None, typer.Option(help="With --training: gates, lora or full; default: full.")
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16", help="With --training: autocast to bfloat16.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto (default), float32, bfloat16, float16, float64, comma-separated."),
    ] = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a PNG here.")] = None,
    seed: Seed = None,
) -> None:
    """Measure speed and memory of prefill and decoding, dense and pruned, side by side."""
    for path in (json_file, plot_file):
        if path is not None:
            check_writable(path)
    if model is not None and architecture is not None:
        raise CtxpruneError("`--model` and `--architecture` exclude each other")
    if training:
        options = given(
            context=numbers(context), repeats=repeats, text=text, train=train, bf16=bf16
        )
        _training(current(model), options, json_file)
        return
    options = given(
        architecture=architecture,
        batch=numbers(batch),
        context=numbers(context),
        unequal=unequal,
        sparsity=numbers(sparsity),
        policy=policy,
        evict=evict,
        modes=words(modes),
        compile=compiled,
        max_rows=max_rows,
        repeats=repeats,
        prefills=prefills,
        steps=steps,
        text=text,
        dtype=words(dtype),
        device=device,
        seed=seed,
    )
    from ctxprune.evals.config import BenchConfig
    from ctxprune.evals.speed.bench import bench as run
    from ctxprune.evals.speed.speed_report import plot, rich_table

    config = BenchConfig.from_mapping(options, "the options")
    folder = None if architecture is not None else current(model)
    state = Path(".ctxprune") / "bench-state.json"
    results = run(folder, config, state=state, on_event=say)
    if json_file is not None:
        write_text(json_file, json.dumps(results, indent=2) + "\n")
        say(f"wrote {json_file}")
    if plot_file is not None:
        plot_file.parent.mkdir(parents=True, exist_ok=True)
        plot(results, plot_file)
        say(f"wrote {plot_file}")
    stdout.print(rich_table(results))


def _training(folder: Path, options: dict[str, Any], json_file: Path | None) -> None:
    """Measure steps of tuning, and print a table."""
    from ctxprune.evals.report.tables import terminal_table
    from ctxprune.evals.speed.training_cost import TrainingCostConfig, training_cost
    from ctxprune.evals.speed.training_report import table

    config = TrainingCostConfig.from_mapping(options, "the options")
    results = training_cost(folder, config, on_event=say)
    if json_file is not None:
        write_text(json_file, json.dumps(results, indent=2) + "\n")
        say(f"wrote {json_file}")
    stdout.print(terminal_table(table(results)))
