"""`ctxprune eval`: perplexity and tasks at several levels of sparsity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import check_writable, say, write_text
from ctxprune.cli.console import out as stdout
from ctxprune.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    Evict,
    MaxRows,
    Model,
    Policy,
    Seed,
    given,
    numbers,
    whole,
    words,
)
from ctxprune.cli.workspace import current

EXAMPLES = """
Examples:

  ctxprune eval --tasks hellaswag,piqa

  ctxprune eval --sparsity 0,0.5,0.8 --json results.json

  ctxprune eval --tasks retrieval,last_word --lengths 1024,2048 --text book.txt

  ctxprune eval --policy h2o --evict prompt --context 1280 --prompt 1024 --sparsity 0.8

  ctxprune eval --policy sink --sparsity 0.8 --tasks piqa --data-dir ./tasks --limit 100
"""


def evaluate(
    model: Model = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="retrieval, last_word and lm-eval's tasks, comma-separated."),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Levels, comma-separated; default: 0 and the calibrated.")
    ] = None,
    policy: Policy = None,
    evict: Evict = None,
    max_rows: MaxRows = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text for perplexity, retrieval, last_word: file or datasets name."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens a window of that text, for perplexity; default: 512.")
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(help="How many of them are read and not scored; default: the first."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="At most so many tokens of it, for perplexity; default: all.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Prompt lengths of the retrieval task, comma-separated."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Documents a task; default: all. Of retrieval, prompts a length and depth: 10; "
            "of last_word: 500."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Texts a forward pass, at most; default: 8.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of TASK.jsonl, to run the tasks offline.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    seed: Seed = None,
) -> None:
    """Measure a model at several levels of sparsity, with tokens really evicted."""
    if json_file is not None:
        check_writable(json_file)
    folder = current(model)
    options = given(
        tasks=words(tasks),
        sparsity=numbers(sparsity),
        policy=policy,
        evict=evict,
        max_rows=max_rows,
        text=text,
        context=context,
        prompt=prompt,
        tokens=tokens,
        lengths=whole(lengths),
        limit=limit,
        batch_size=batch_size,
        data_dir=data_dir,
        dtype=dtype,
        device=device,
        device_map=device_map,
        seed=seed,
    )
    from ctxprune.evals.quality.evaluate import EvalConfig
    from ctxprune.evals.quality.evaluate import evaluate as run
    from ctxprune.evals.report.report import rich_retrieval, rich_table

    config = EvalConfig.from_mapping(options, "the options")
    state = Path(".ctxprune") / "eval-state.json"
    results = run(folder, config, state=state, on_event=say)
    if json_file is not None:
        write_text(json_file, json.dumps(results, indent=2) + "\n")
        say(f"wrote {json_file}")
    stdout.print(rich_table([results]))
    cells = rich_retrieval([results])
    if cells is not None:
        stdout.print(cells)
