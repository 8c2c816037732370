"""`ctxprune generate`: continue a prompt, with eviction."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxprune.cli.console import say
from ctxprune.cli.options import Model, Seed, given, option
from ctxprune.cli.workspace import current
from ctxprune.pruner.config import FromMapping, check_at_least, check_sparsity
from ctxprune.pruner.errors import CtxpruneError

EXAMPLES = """
Examples:

  ctxprune generate "Once upon a time"

  ctxprune generate --sparsity 0.5 --max-new-tokens 200 --temperature 0.8 "It was a dark night"
"""


@dataclass(frozen=True)
class GenerateConfig(FromMapping):
    """One text to write.

    Attributes:
        prompt: text to continue.
        sparsity: level in [0, 1); None: the tuned one.
        policy: which eviction policy decides.
        max_new_tokens: tokens to write.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.
    """

    prompt: str
    sparsity: float | None = None
    policy: str = "gate"
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise CtxpruneError("the prompt is empty", 'give some text: ctxprune generate "It was"')
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("temperature", self.temperature, 0.0)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Level in [0, 1); default: the tuned one.")
    ] = None,
    policy: Annotated[str | None, option("gate, sink or window", GenerateConfig.policy)] = None,
    max_new_tokens: Annotated[
        int | None, option("Tokens to write", GenerateConfig.max_new_tokens)
    ] = None,
    temperature: Annotated[
        float | None, option("Of sampling, 0 is greedy", GenerateConfig.temperature)
    ] = None,
    seed: Seed = None,
) -> None:
    """Continue a prompt, streaming; rows and bytes kept are reported on stderr."""
    options = given(
        prompt=prompt,
        sparsity=sparsity,
        policy=policy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    config = GenerateConfig.from_mapping(options, "the options")
    write(current(model), config)


def write(folder: Path, config: GenerateConfig) -> None:
    """Stream a continuation to stdout, and say on stderr what the cache holds after it."""
    import torch
    from transformers import TextStreamer

    from ctxprune.pruner.checkpoint import load, load_tokenizer
    from ctxprune.pruner.engine import handle_of

    pruned = load(folder, sparsity=config.sparsity, policy=config.policy)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(config.prompt, return_tensors="pt")
    torch.manual_seed(config.seed)
    sampling = {"do_sample": True, "temperature": config.temperature}
    began = time.monotonic()
    continue_text: Any = pruned.generate
    out = continue_text(
        **ids,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **(sampling if config.temperature > 0 else {"do_sample": False}),
    )
    pace = (out.shape[1] - ids["input_ids"].shape[1]) / (time.monotonic() - began)
    cache = handle_of(pruned).last_cache
    if cache is None or cache.tokens is None:
        say(f"dense, {pace:.1f} tokens/s")
        return
    say(
        f"{cache.sparsity:.1%} of {int(cache.tokens[0])} tokens forgotten, cache "
        f"{cache.nbytes / 1e6:.2f} MB of {cache.dense_nbytes / 1e6:.2f} MB dense, "
        f"{pace:.1f} tokens/s"
    )
