"""`ctxprune generate`: continue a prompt, with eviction."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import Model, Seed
from ctxprune.cli.workspace import current
from ctxprune.pruner.errors import CtxpruneError

EXAMPLES = """
Examples:

  ctxprune generate "Once upon a time"

  ctxprune generate --sparsity 0.5 --max-new-tokens 200 --temperature 0.8 "It was a dark night"
"""


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Level in [0, 1); default: the tuned one.")
    ] = None,
    policy: Annotated[str, typer.Option(help="gate, sink or window.")] = "gate",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Seed = None,
) -> None:
    """Continue a prompt, streaming; rows and bytes kept are reported on stderr."""
    if not prompt.strip():
        raise CtxpruneError("the prompt is empty", 'give some text: ctxprune generate "It was"')
    folder = current(model)
    import torch
    from transformers import TextStreamer

    from ctxprune.pruner.checkpoint import load, load_tokenizer
    from ctxprune.pruner.engine import handle_of

    pruned = load(folder, sparsity=sparsity, policy=policy)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed or 0)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    began = time.monotonic()
    write: Any = pruned.generate
    out = write(
        **ids,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **({"do_sample": False} | sampling),
    )
    pace = (out.shape[1] - ids["input_ids"].shape[1]) / (time.monotonic() - began)
    cache = handle_of(pruned).last_cache
    if cache is None or cache.tokens is None:
        say(f"dense, {pace:.1f} tokens/s")
        return
    say(
        f"{cache.sparsity:.1%} of {int(cache.tokens[0])} tokens forgotten, cache "
        f"{cache.nbytes / 1e6:.2f} MB, {pace:.1f} tokens/s"
    )
