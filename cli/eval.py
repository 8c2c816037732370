"""`ctxprune eval`: perplexity and tasks at several levels of sparsity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import data, only_data, say, write_json
from ctxprune.cli.console import out as stdout
from ctxprune.cli.options import (
    EVICTION,
    OUTPUT,
    Device,
    DeviceMap,
    Dtype,
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
from ctxprune.cli.progress import evaluation_progress
from ctxprune.cli.workspace import current
from ctxprune.pruner.files import check_writable
from ctxprune.pruner.words import line

EXAMPLES = """
Examples:

  ctxprune eval --tasks hellaswag,piqa

  ctxprune eval --sparsity 0,0.5,0.8 --out results.json

  ctxprune eval --tasks gsm8k --num-fewshot 5 --apply-chat-template --limit 100

  ctxprune eval --tasks retrieval,multi_key,conversation --lengths 1024,2048 --text book.txt

  ctxprune eval --policy h2o --evict prompt --max-length 1280 --prompt 1024 --sparsity 0.8

  ctxprune eval --policy sink --sparsity 0.8 --tasks piqa --data-dir ./tasks --limit 100
"""

TASKS = "Tasks"
TEXT = "Perplexity, and the tasks on the same text"
WORK = "Work"


def _count(text: str | None) -> int | str | None:
    """A number, or a word such as `auto`."""
    return int(text) if text and text.isdecimal() else text


def evaluate(
    ctx: typer.Context,
    model: Model = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: fidelity; retrieval, multi_key, multi_value, variable_tracking, "
            "counting (facts in a long text); conversation; last_word; and lm-eval's tasks, groups "
            "and tags.",
            callback=words,
            rich_help_panel=TASKS,
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Levels, comma-separated: shares of the earlier tokens that are gone when a query "
            "looks; default: 0 and the calibrated.",
            callback=numbers,
            rich_help_panel=EVICTION,
        ),
    ] = None,
    policy: Policy = None,
    evict: Evict = None,
    max_rows: MaxRows = None,
    list_tasks: Annotated[
        bool,
        typer.Option(
            "--list-tasks",
            help="Print every task, group and tag, and do no more.",
            rich_help_panel=TASKS,
        ),
    ] = False,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            help="Examples before each document; default: the task's own.", rich_help_panel=TASKS
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Ask as turns of a chat, by the model's template.",
            rich_help_panel=TASKS,
        ),
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="Text before each request.", rich_help_panel=TASKS)
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            help="Settings of generation: temperature=0.7,do_sample=true.", rich_help_panel=TASKS
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of TASK.jsonl, to run tasks offline; few-shot examples are of it too.",
            rich_help_panel=TASKS,
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder with .yaml definitions of tasks.", rich_help_panel=TASKS),
    ] = None,
    log_samples: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write each document, request and answer to; such tasks are always "
            "measured anew.",
            rich_help_panel=TASKS,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity and our own tasks: file or datasets name.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Tokens a window of that text, for perplexity; default: 512.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            help="How many of them are read and not scored; default: the first.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            help="At most so many tokens of it, for perplexity; default: all.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths of the tasks with facts in a long text, comma-separated; "
            "default: 1024,2048,4096.",
            callback=whole,
            rich_help_panel=TEXT,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the published model, converted, for fidelity; default: the model "
            "itself at sparsity 0, if its weights were left alone.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Documents a task; default: all. Of tasks with facts in a long text, prompts a "
            "length and depth: 10; of conversation: 16; of last_word: 500; of fidelity, texts of a "
            "kind: 32.",
            rich_help_panel=WORK,
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Texts a forward pass, at most, or `auto`: as many as make 8,192 tokens; "
            "default: 8.",
            callback=_count,
            rich_help_panel=WORK,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Measure anew what was measured before.", rich_help_panel=OUTPUT
        ),
    ] = False,
    out: ResultsFile = None,
    as_json: Json = False,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
) -> None:
    """Measure a model at several levels of sparsity, with tokens really evicted."""
    if list_tasks:
        _list(include_path)
        return
    for path in (out, log_samples and log_samples / "samples.jsonl"):
        if path is not None:
            check_writable(path)
    from ctxprune.evals.config import EvalConfig
    from ctxprune.evals.quality.evaluate import evaluate as run
    from ctxprune.evals.report.report import rich_tables
    from ctxprune.evals.results import Evaluation, measured

    config = EvalConfig(**settings(ctx, EvalConfig))
    folder = current(model)
    state = Path(".ctxprune") / "eval-state.json"
    with only_data(as_json), evaluation_progress() as on_progress:
        results = run(
            folder, config, state=state, fresh=fresh, on_event=say, on_progress=on_progress
        )
        if out is not None:
            write_json(out, results)
            say(f"wrote {out}")
        for table in rich_tables([measured(Evaluation, results)]):
            stdout.print(table)
    if as_json:
        data(results)


def _list(include_path: Path | None) -> None:
    """Every name that `--tasks` takes, one a line, with what it is."""
    from ctxprune.evals.config import OWN_TASKS
    from ctxprune.evals.quality.tasks import listed

    names = [*((name, "task of ctxprune") for name in OWN_TASKS), *listed(include_path)]
    sys.stdout.write("".join(f"{line(name)}\t{kind}\n" for name, kind in names))
