"""Writing texts with a cache that forgets: one batch of prompts, greedy, sampled or by beams."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ctxprune.pruner.config import GenerateConfig
from ctxprune.pruner.engine import handle_of


@dataclass(frozen=True)
class Generation:
    """What was written, and what it took.

    Attributes:
        texts: prompt and continuation, `num_return_sequences` for each prompt in turn.
        tokens_per_s: new tokens of all returned texts a second, prefill included.
        sparsity: share of the tokens seen that are gone from the cache at the end; 0 if dense.
        kv_bytes: of the cache at the end; dense_kv_bytes: of a dense one. 0 if dense.
        capped: share of the times that the cap on rows was asked at which it made some leave.
    """

    texts: list[str]
    tokens_per_s: float
    sparsity: float
    kv_bytes: int
    dense_kv_bytes: int
    capped: float


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerateConfig,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue the prompts, at the policy and level that the model's handle is set to.

    Args:
        model: from `load`. tokenizer: its own. config: what to write.
        on_text: receives the text as it is written; one prompt, one text, no beams.
    """
    torch.manual_seed(config.seed)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch: Any = tokenizer(list(config.prompt), return_tensors="pt", padding=True)
    options: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "num_return_sequences": config.num_return_sequences,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": config.temperature > 0.0,
    }
    if config.temperature > 0.0:
        options |= {
            "temperature": config.temperature,
            "top_k": config.top_k or 0,
            "top_p": 1.0 if config.top_p is None else config.top_p,
        }
    if config.stop:
        options |= {"stop_strings": list(config.stop), "tokenizer": tokenizer}
    if on_text is not None:
        options["streamer"] = _Streamer(tokenizer, on_text)
    handle = handle_of(model)
    handle.last_cache = None
    copies = max(config.num_beams, config.num_return_sequences)
    lengths = (batch["attention_mask"].sum(dim=1) + config.max_new_tokens).tolist()
    write: Any = model.generate
    began = time.monotonic()
    contexts = [length for length in lengths for _ in range(copies)]
    with handle.fitted(contexts), handle.measure() as usage:
        ids = write(**batch.to(model.device), **options)
    seconds = time.monotonic() - began
    new = ids.shape[0] * (ids.shape[1] - batch["input_ids"].shape[1])
    cache = handle.last_cache
    return Generation(
        tokenizer.batch_decode(ids, skip_special_tokens=True),
        new / seconds,
        0.0 if cache is None else cache.sparsity,
        0 if cache is None else cache.nbytes,
        0 if cache is None else cache.dense_nbytes,
        usage.capped,
    )


class _Streamer(TextStreamer):
    """transformers' streamer, with the text handed on instead of printed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive words as soon as they are sure."""
        self._on_text(text + "\n" * stream_end)
