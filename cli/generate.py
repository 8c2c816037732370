"""`ctxprune generate`: continue prompts, with eviction."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import data, live_memory, read_text, say, stream
from ctxprune.cli.options import (
    OUTPUT,
    SAMPLING,
    TEXT,
    Device,
    DeviceMap,
    Dtype,
    Evict,
    Json,
    Level,
    MaxRows,
    Model,
    Policy,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    option,
    settings,
)
from ctxprune.cli.workspace import current
from ctxprune.pruner.config import GenerateConfig
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.savings import in_words

EXAMPLES = """
Examples:

  ctxprune generate "Once upon a time"

  ctxprune generate --model ./smol "What is the capital of France?"

  ctxprune generate --sparsity 0.5 --max-new-tokens 200 --temperature 0.8 "It was a dark night"

  ctxprune generate --num-beams 4 --stop "." "The captain" "A letter from my sister"

  ctxprune generate --max-rows 256 - < long-prompt.txt

  ctxprune generate --policy snapkv --evict prompt --sparsity 0.8 - < long-prompt.txt

  ctxprune generate --show "Once upon a time"
"""


def generate(
    ctx: typer.Context,
    prompt: Annotated[
        list[str], typer.Argument(help="Texts to continue, as one batch; - reads stdin.")
    ],
    model: Model = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask the prompt in the model's chat template, or continue it as a text; default: "
            "ask where the model was taught a template.",
            rich_help_panel=TEXT,
            show_default=False,
        ),
    ] = None,
    system: System = None,
    max_new_tokens: Annotated[
        int | None, option("Tokens to write", GenerateConfig.max_new_tokens, TEXT)
    ] = None,
    stop: Stop = None,
    num_return_sequences: Annotated[
        int | None, option("Texts a prompt", GenerateConfig.num_return_sequences, TEXT)
    ] = None,
    sparsity: Level = None,
    policy: Policy = None,
    evict: Evict = None,
    max_rows: MaxRows = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    num_beams: Annotated[int | None, option("Beams", GenerateConfig.num_beams, SAMPLING)] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    show: Annotated[
        bool,
        typer.Option(
            "--show",
            help="Colour what is in memory and what is forgotten.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue texts, or answer; a single text streams. stderr tells what the cache holds."""
    texts = [read_text() if text == "-" else text for text in prompt]
    options = {**settings(ctx, GenerateConfig), "prompt": texts}
    config = GenerateConfig(**options)
    write(current(model), config, show=show, as_json=as_json)


def write(
    folder: Path, config: GenerateConfig, *, show: bool = False, as_json: bool = False
) -> None:
    """Write texts to stdout, and say on stderr what the cache holds after it."""
    from ctxprune.pruner.checkpoints.checkpoint import load_off, load_tokenizer
    from ctxprune.pruner.device import place
    from ctxprune.pruner.engine.handle import handle_of
    from ctxprune.pruner.generation import chat_template
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
    if config.chat is None and chat_template(model, tokenizer, config) is not None:
        say("asking in the model's chat template; `--no-chat` continues the text instead")
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
    if done.savings is None:
        say(f"dense, {pace}")
        return
    capped = f", at the cap {done.capped:.0%} of the time" if done.capped else ""
    say(f"{in_words(done.sparsity)}; {done.savings.left}")
    say(f"{done.savings.memory}{capped}; {pace}")
