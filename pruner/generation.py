"""Writing texts with a cache that forgets: one batch of prompts, greedy, sampled or by beams."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from ctxprune.pruner.config import GenerateConfig
from ctxprune.pruner.conversation import ChatTemplate, Numbers, Streamer, as_told, opening
from ctxprune.pruner.data import pad
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.savings import Savings

OnMemory = Callable[[list[str], list[float]], None]


@dataclass(frozen=True)
class Generation:
    """What was written, and what it took.

    Attributes:
        texts: prompt and continuation, `num_return_sequences` for each prompt in turn; of a chat
            the answers alone.
        chat: whether the prompts were messages of a user.
        tokens_per_s: new tokens of all returned texts a second, prefill included.
        sparsity: that was realised: the mean share of the earlier tokens that a token did not see,
            over all positions; 0 if dense.
        capped: share of the times that the cap on rows was asked at which it made some leave.
        savings: what the cache held at the end; None if dense.
    """

    texts: list[str]
    chat: bool
    tokens_per_s: float
    sparsity: float
    capped: float
    savings: Savings | None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerateConfig,
    on_text: Callable[[str], None] | None = None,
    on_memory: OnMemory | None = None,
) -> Generation:
    """Continue the prompts, at the policy and level that the model's handle is set to.

    Args:
        model: from `load`. tokenizer: its own. config: what to write.
        on_text: receives the text as it is written; one prompt, one text, no beams.
        on_memory: receives, after every token of such a text, the pieces that the tokens stand for
            and the share of the layers that the next query will find each of them in.

    Raises:
        CtxpruneError: a chat is asked for, and the tokenizer has no template or it refuses; the
            model gives no numbers.
    """
    torch.manual_seed(config.seed)
    tokenizer.padding_side = "left"
    pad(tokenizer)
    template = chat_template(model, tokenizer, config)
    batch = _read(tokenizer, config, template)
    options: dict[str, Any] = {
        **config.sampling,
        "num_beams": config.num_beams,
        "num_return_sequences": config.num_return_sequences,
        "pad_token_id": tokenizer.pad_token_id,
        "logits_processor": LogitsProcessorList([Numbers()]),
    }
    if template is not None:
        options |= template.ending
    if config.stop:
        options |= {"stop_strings": list(config.stop), "tokenizer": tokenizer}
    if on_text is not None:
        options["streamer"] = Streamer(tokenizer, on_text, skip_prompt=template is not None)
    handle = handle_of(model)
    handle.last_cache = None
    copies = max(config.num_beams, config.num_return_sequences)
    lengths = (batch["attention_mask"].sum(dim=1) + config.max_new_tokens).tolist()
    write: Any = model.generate
    began = time.monotonic()
    contexts = [length for length in lengths for _ in range(copies)]
    prompts = [length - config.max_new_tokens for length in contexts]
    with handle.running(handle.at(contexts, prompts)), handle.measure() as usage:
        if on_memory is not None:
            cache = handle.cache(record=True)
            options["past_key_values"] = cache
            options["streamer"] = _Memory(tokenizer, cache, on_memory)
        with as_told(model):
            ids = write(**batch.to(input_device(model)), **options)
    seconds = time.monotonic() - began
    read = batch["input_ids"].shape[1]
    held = handle.last_cache
    return Generation(
        tokenizer.batch_decode(
            ids if template is None else ids[:, read:], skip_special_tokens=True
        ),
        template is not None,
        ids.shape[0] * (ids.shape[1] - read) / seconds,
        usage.sparsity,
        usage.capped_share,
        None if held is None else held.savings,
    )


def chat_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig
) -> ChatTemplate | None:
    """The template that the prompts are written in; None: they are texts to continue.

    Raises:
        CtxpruneError: it is asked for, and there is none.
    """
    asked = config.chat or config.system is not None
    if config.chat is False or not (asked or tokenizer.chat_template):
        return None
    template = ChatTemplate(model, tokenizer)
    return template if asked or template.trained else None


def _read(
    tokenizer: PreTrainedTokenizerBase, config: GenerateConfig, template: ChatTemplate | None
) -> Any:
    """The prompts as a padded batch of ids."""
    texts = list(config.prompt)
    if template is not None:
        before = opening(config)
        texts = [template.render([*before, {"role": "user", "content": text}]) for text in texts]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=template is None)


class _Memory(BaseStreamer):
    """Tells what is in memory after every token."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cache: PrunedCache | DynamicCache,
        on_memory: OnMemory,
    ) -> None:
        self._tokenizer = tokenizer
        self._cache = cache
        self._on_memory = on_memory
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._whole = 0  # tokens up to the last one that ends a character

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then token by token."""
        for token in value.flatten().tolist():
            self._ids.append(token)
            before = self._decode(self._ids[max(self._whole - 1, 0) : self._whole])
            text = self._decode(self._ids[max(self._whole - 1, 0) :])[len(before) :]
            if text.endswith("\ufffd") and len(self._ids) - self._whole < 4:
                self._pieces.append("")
            else:
                self._pieces.append(text)
                self._whole = len(self._ids)
        self._on_memory(self._pieces, self._shares())

    def end(self) -> None:
        """Nothing is held back."""

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _shares(self) -> list[float]:
        """Of all tokens; the newest has not been read yet, so it counts as held."""
        expires = getattr(self._cache, "expires", None)
        if not expires:
            return [1.0] * len(self._ids)
        seen = expires[0].shape[1]
        held: list[float] = (torch.cat(expires) > seen).double().mean(dim=0).tolist()
        return held + [1.0] * (len(self._ids) - len(held))
