"""`ctxprune generate`: continue prompts, with eviction."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import data, live_memory, say, stream
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
    option,
)
from ctxprune.cli.workspace import current
from ctxprune.pruner.config import GenerateConfig
from ctxprune.pruner.errors import CtxpruneError

EXAMPLES = """
Examples:

  ctxprune generate "Once upon a time"

  ctxprune generate --sparsity 0.5 --max-new-tokens 200 --temperature 0.8 "It was a dark night"

  ctxprune generate --num-beams 4 --stop "." "The captain" "A letter from my sister"

  ctxprune generate --max-rows 256 - < long-prompt.txt

  ctxprune generate --policy snapkv --evict prompt --sparsity 0.8 - < long-prompt.txt

  ctxprune generate --show "Once upon a time"
"""


def generate(
    prompt: Annotated[
        list[str], typer.Argument(help="Texts to continue, as one batch; - reads stdin.")
    ],
    model: Model = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Level in [0, 1); default: the tuned one.")
    ] = None,
    policy: Policy = None,
    evict: Evict = None,
    max_rows: MaxRows = None,
    max_new_tokens: Annotated[
        int | None, option("Tokens to write", GenerateConfig.max_new_tokens)
    ] = None,
    temperature: Annotated[
        float | None, option("Of sampling, 0 is greedy", GenerateConfig.temperature)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest that have this share.")
    ] = None,
    num_beams: Annotated[int | None, option("Beams", GenerateConfig.num_beams)] = None,
    num_return_sequences: Annotated[
        int | None, option("Texts a prompt", GenerateConfig.num_return_sequences)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends a text; may be repeated.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    seed: Seed = None,
    show: Annotated[
        bool, typer.Option("--show", help="Colour what is in memory and what is forgotten.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the figures.")] = False,
) -> None:
    """Continue texts; a single one streams. What the cache holds is reported on stderr."""
    options = given(
        prompt=[sys.stdin.read() if text == "-" else text for text in prompt],
        sparsity=sparsity,
        policy=policy,
        evict=evict,
        max_rows=max_rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        stop=stop,
        dtype=dtype,
        device=device,
        device_map=device_map,
        seed=seed,
    )
    config = GenerateConfig.from_mapping(options, "the options")
    write(current(model), config, show=show, as_json=as_json)


def write(
    folder: Path, config: GenerateConfig, *, show: bool = False, as_json: bool = False
) -> None:
    """Write texts to stdout, and say on stderr what the cache holds after it."""
    from ctxprune.pruner.checkpoints.checkpoint import load_off, load_tokenizer
    from ctxprune.pruner.device import place
    from ctxprune.pruner.engine.handle import handle_of
    from ctxprune.pruner.generation import generate as run

    single = len(config.prompt) == config.num_beams == config.num_return_sequences == 1
    if show and (as_json or not single):
        raise CtxpruneError(
            "--show colours one text as it is written", "give one prompt, without --json or beams"
        )
    model = load_off(folder, place(config.device, config.dtype, config.device_map), say)
    handle = handle_of(model)
    sparsity = handle.config.tuned if config.sparsity is None else config.sparsity
    handle.use(config.policy, sparsity, max_rows=config.max_rows, evict=config.evict)
    tokenizer = load_tokenizer(folder)
    streams = single and not as_json
    if show:
        with live_memory() as on_memory:
            done = run(model, tokenizer, config, on_memory=on_memory)
    else:
        done = run(model, tokenizer, config, stream if streams else None)
    if as_json:
        data(dataclasses.asdict(done))
    elif not streams:
        stream("\n\n".join(done.texts) + "\n")
    pace = f"{done.tokens_per_s:.1f} tokens/s"
    if done.dense_kv_bytes == 0:
        say(f"dense, {pace}")
        return
    capped = f", at the cap {done.capped:.0%} of the time" if done.capped else ""
    memory = f"cache {done.kv_bytes / 1e6:.2f} MB of {done.dense_kv_bytes / 1e6:.2f} MB dense"
    if done.kv_bytes >= done.dense_kv_bytes:
        memory = f"the text is shorter than a page: {done.room:.0f} rows of room a layer"
    say(
        f"{done.sparsity:.1%} of the tokens forgotten, {done.rows:.0f} rows a layer, "
        f"{memory}{capped}, {pace}"
    )
