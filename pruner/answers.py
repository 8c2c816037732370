"""Answers that a model itself writes about texts: its gates learn from them and are judged by them.

An instruction that stands before its text is the harder one: the model has to remember it while it
reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.pruner.data import by_template, encode
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of

# Tokens that an answer has at least, and at most.
LEAST, MOST = 60, 160
# Answers that are written at once.
TOGETHER = 8
# What gates learn from; what they are judged by (`evals.quality.fidelity`) asks for other things.
INSTRUCTIONS = (
    "What is this text about?",
    "List the people in this text, and what each of them wants.",
    "Quote the sentence that matters most in this text, and say why it does.",
    "Continue this text by one paragraph, in the same style.",
    "Give this text a title, and defend it.",
    "Say in simple words what this text says.",
    "Which numbers, dates and names does this text mention?",
    "Write three questions that this text answers, with their answers.",
    "What happens first in this text, what next, and what at last?",
    "Criticise this text: what is unclear, and what is missing?",
    "Rewrite the beginning of this text as a dialogue.",
    "Write a report on this text for somebody who has no time to read it.",
)


def request(
    tokenizer: PreTrainedTokenizerBase, instruction: str, text: str, *, first: bool
) -> list[int]:
    """An instruction before a text or behind it, as the model is used to be asked; token ids."""
    asked = "\n\n".join((instruction, text) if first else (text, instruction))
    if tokenizer.chat_template is None:
        return encode(tokenizer, f"{asked}\n\nAnswer:")
    turn = [{"role": "user", "content": asked}]
    return encode(tokenizer, by_template(tokenizer, turn, ask=True))


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[list[int]]
) -> list[list[int]]:
    """What the model answers with all of its cache: its likeliest tokens, the last one its end.

    Args:
        model: with its handle at `model.ctxprune`, which is left at sparsity 0.
        requests: written in one batch.
    """
    handle_of(model).use(sparsity=0.0, max_rows=0)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, requests))
    padded = [[padding or 0] * (width - len(asked)) + asked for asked in requests]
    mask = [[0] * (width - len(asked)) + [1] * len(asked) for asked in requests]
    device = input_device(model)
    with torch.inference_mode():
        output: Any = model.generate(  # type: ignore[operator]
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            do_sample=False,
            min_new_tokens=LEAST,
            max_new_tokens=MOST,
            pad_token_id=padding,
        )
    return [_until_end(tokens, model) for tokens in output[:, width:].tolist()]


def windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Tensor,
    on_answer: Callable[[int, int], None],
) -> Tensor:
    """Windows of text, each made into a request, its answer, and text to the end.

    Args:
        texts: (windows, length) int64. on_answer: told how many are written, and of how many.

    Returns:
        (windows, length) int64.
    """
    length = texts.shape[1]
    requests, rests = [], []
    for number, ids in enumerate(texts.tolist()):
        instruction = INSTRUCTIONS[number // 2 % len(INSTRUCTIONS)]
        first = number % 2 == 0
        read = length - MOST - len(request(tokenizer, instruction, "", first=first))
        text = str(tokenizer.decode(ids[: max(read, 0)])).strip()
        requests.append(request(tokenizer, instruction, text, first=first))
        rests.append(ids[read:] + ids)
    rows: list[list[int]] = []
    for start in range(0, len(texts), TOGETHER):
        part = slice(start, start + TOGETHER)
        written = answered(model, tokenizer, requests[part])
        for asked, answer, rest in zip(requests[part], written, rests[part], strict=True):
            rows.append((asked + answer + rest)[:length])
        on_answer(len(rows), len(texts))
    return torch.tensor(rows)


def _until_end(tokens: list[int], model: PreTrainedModel) -> list[int]:
    """Tokens up to the first one that ends a text, that one included."""
    ends = model.generation_config.eos_token_id
    known = set(ends) if isinstance(ends, list) else {ends}
    last = next((n for n, token in enumerate(tokens) if token in known), len(tokens) - 1)
    return tokens[: last + 1]
