"""`ctxprune tune`: fine-tune a converted model to a sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import say, tuning_progress
from ctxprune.cli.options import Device, Force, Model, Seed, given, option
from ctxprune.cli.workspace import current, set_current
from ctxprune.pruner.config import TuneConfig

EXAMPLES = """
Examples:

  ctxprune tune --sparsity 0.8

  ctxprune tune --model ./m --sparsity 0.8 --data books.jsonl.gz --steps 1000 --train lora

  ctxprune tune --sparsity 0.8 --resume
"""

Text = typer.Option(help=".txt/.jsonl(.gz) file, folder or datasets name; default: embedded.")


def tune(
    model: Model = None,
    sparsity: Annotated[
        float | None,
        option(
            "Share of the context to drop, in [0, 1); 0 trains a dense control", TuneConfig.sparsity
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to make; default: MODEL-tuned.")
    ] = None,
    data: Annotated[str | None, Text] = None,
    valid: Annotated[
        str | None, typer.Option(help="Held-out text for calibration, like --data.")
    ] = None,
    steps: Annotated[
        int | None,
        option("Optimizer steps; 0 with --train gates: calibrate alone", TuneConfig.steps),
    ] = None,
    local_steps: Annotated[
        int | None,
        option("Steps before, of the gates alone, layer by layer", TuneConfig.local_steps),
    ] = None,
    local_lr: Annotated[
        float | None, option("Peak learning rate of the gates in them", TuneConfig.local_lr)
    ] = None,
    train: Annotated[str | None, option("gates, lora or full", TuneConfig.train)] = None,
    context: Annotated[int | None, option("Tokens a window", TuneConfig.context)] = None,
    batch_size: Annotated[
        int | None, option("Windows a micro-batch", TuneConfig.batch_size)
    ] = None,
    accumulate: Annotated[int | None, option("Micro-batches a step", TuneConfig.accumulate)] = None,
    lr: Annotated[float | None, option("Peak learning rate of the weights", TuneConfig.lr)] = None,
    gate_lr: Annotated[
        float | None, option("Peak learning rate of the gates", TuneConfig.gate_lr)
    ] = None,
    distill: Annotated[
        float | None,
        option("Weight in [0, 1] of distillation from the model itself, dense", TuneConfig.distill),
    ] = None,
    ramp: Annotated[
        float | None, option("Share of the steps over which sparsity rises", TuneConfig.ramp)
    ] = None,
    lora_rank: Annotated[
        int | None, option("Rank of the LoRA matrices", TuneConfig.lora_rank)
    ] = None,
    alpha: Annotated[float | None, option("Final alpha of alpha_sigmoid", TuneConfig.alpha)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Training tokens; sets the number of steps.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="End the training after this time, and calibrate.")
    ] = None,
    dense_share: Annotated[
        float | None, option("Share of the text read with the gates off", TuneConfig.dense_share)
    ] = None,
    save_every: Annotated[
        int | None, option("Steps between resumable checkpoints", TuneConfig.save_every)
    ] = None,
    bf16: Annotated[bool | None, typer.Option(help="Autocast to bfloat16.")] = None,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations to save memory.")
    ] = None,
    device: Device = None,
    seed: Seed = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    force: Force = False,
) -> None:
    """Fine-tune a converted model to prune, and calibrate its levels of sparsity."""
    config = TuneConfig(
        **given(
            sparsity=sparsity,
            data=data,
            valid=valid,
            steps=steps,
            local_steps=local_steps,
            local_lr=local_lr,
            train=train,
            context=context,
            batch_size=batch_size,
            accumulate=accumulate,
            lr=lr,
            gate_lr=gate_lr,
            distill=distill,
            ramp=ramp,
            lora_rank=lora_rank,
            alpha=alpha,
            max_tokens=max_tokens,
            max_minutes=max_minutes,
            dense_share=dense_share,
            save_every=save_every,
            bf16=bf16,
            checkpointing=checkpointing,
            device=device,
            seed=seed,
        )
    )
    folder = current(model)
    target = out or folder.with_name(f"{folder.name}-tuned")
    from ctxprune.pruner.training import tune as tuning

    with tuning_progress() as progress:
        tuning.tune(folder, target, config, resume=resume, force=force, **vars(progress))
    set_current(target)
    say(f"wrote {target}, now the current model; next: ctxprune eval --sparsity 0,0.5,0.8")
