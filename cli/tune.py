"""`ctxprune tune`: fine-tune a converted model to a sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import (
    EVICTION,
    MODEL,
    OUTPUT,
    TEXT,
    Device,
    Force,
    Model,
    Seed,
    option,
    settings,
    words,
)
from ctxprune.cli.progress import tuning_progress
from ctxprune.cli.workspace import check_notable, current, set_current
from ctxprune.pruner.config import TuneConfig

EXAMPLES = """
Examples:

  ctxprune tune --sparsity 0.8

  ctxprune tune --model ./m --sparsity 0.8 --data books.jsonl.gz --steps 1000 --train lora

  ctxprune tune --sparsity 0.8 --data chats.parquet --text-field messages --report-to tensorboard

  ctxprune tune --sparsity 0.8 --resume
"""

TRAINING = "Training"
OBJECTIVE = "Objective"


def tune(
    ctx: typer.Context,
    model: Model = None,
    sparsity: Annotated[
        float | None,
        option(
            "Share of the earlier tokens that a token no longer sees, on the mean, in [0, 1); 0 "
            "trains a dense baseline",
            TuneConfig.sparsity,
            EVICTION,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder to make; default: MODEL-tuned.", rich_help_panel=OUTPUT
        ),
    ] = None,
    force: Force = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=OUTPUT),
    ] = False,
    save_every: Annotated[
        int | None, option("Steps between resumable checkpoints", TuneConfig.save_every, OUTPUT)
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option(
            help="Experiment trackers, comma-separated: tensorboard, wandb, ...",
            callback=words,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Training text: file (txt, jsonl, json, csv, parquet), folder or datasets name; "
            "default: the embedded sample of public-domain books.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            help="Field of each row with the text, or the messages of a chat; default: text or "
            "messages.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(
            "--validation-data",
            help="Held-out text for calibration, like --data; default: its last twentieth.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help=f"Tokens a window of text; default: {TuneConfig.context}.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    train: Annotated[
        str | None,
        option("gates (the model's weights stay), lora or full", TuneConfig.train, TRAINING),
    ] = None,
    steps: Annotated[
        int | None,
        option(
            "Optimizer steps; 0 with --train gates: calibrate alone", TuneConfig.steps, TRAINING
        ),
    ] = None,
    batch_size: Annotated[
        int | None, option("Windows a micro-batch", TuneConfig.batch_size, TRAINING)
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            "--gradient-accumulation-steps",
            help=f"Micro-batches a step; default: {TuneConfig.accumulate}.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Training tokens; sets the number of steps.", rich_help_panel=TRAINING),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            help="End the training after this time, and calibrate.", rich_help_panel=TRAINING
        ),
    ] = None,
    lr: Annotated[
        float | None, option("Peak learning rate of the weights", TuneConfig.lr, TRAINING)
    ] = None,
    gate_lr: Annotated[
        float | None, option("Peak learning rate of the gates", TuneConfig.gate_lr, TRAINING)
    ] = None,
    lora_rank: Annotated[
        int | None, option("Rank of the LoRA matrices", TuneConfig.lora_rank, TRAINING)
    ] = None,
    local_steps: Annotated[
        int | None,
        option(
            "Steps of layer-wise distillation before, of the gates alone",
            TuneConfig.local_steps,
            TRAINING,
        ),
    ] = None,
    local_lr: Annotated[
        float | None,
        option("Peak learning rate of the gates in them", TuneConfig.local_lr, TRAINING),
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            help="Weight in [0, 1] of distillation from the model as it was, dense, against the "
            "loss on the text; default: 1 with --train gates, 0.5 with lora, 0 with full.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    answers: Annotated[
        float | None,
        typer.Option(
            help="Share of the windows that are answers of the model itself to instructions about "
            "the text; default: 0.25 for a chat model that is distilled, else 0.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    dense_share: Annotated[
        float | None,
        option("Share of the text read with the gates off", TuneConfig.dense_share, OBJECTIVE),
    ] = None,
    ramp: Annotated[
        float | None,
        option("Share of the steps over which sparsity rises", TuneConfig.ramp, OBJECTIVE),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--entmax-alpha",
            help="Final alpha of the gates' alpha-sigmoid (1: a sigmoid, 2: sparse); "
            f"default: {TuneConfig.alpha:g}.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16", help="Autocast to bfloat16.", rich_help_panel=MODEL)
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations to save memory.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Device = None,
    seed: Seed = None,
) -> None:
    """Fine-tune a converted model to prune, and calibrate its levels of sparsity."""
    config = TuneConfig(**settings(ctx, TuneConfig))
    check_notable()
    folder = current(model)
    target = out or folder.with_name(f"{folder.name}-tuned")
    from ctxprune.pruner.training import tune as tuning

    with tuning_progress() as progress:
        tuning.tune(folder, target, config, resume=resume, force=force, **vars(progress))
    set_current(target)
    say(f"wrote {target}, now the current model; next: ctxprune eval --sparsity 0,0.5,0.8")
