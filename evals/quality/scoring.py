"""Texts in passes of several: their last logits, and how likely a continuation is.

Each text is read at the sparsity that is asked for, whatever it shares a pass with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.finite import check_numbers

# Tokens a pass at most, unless one text has more: logits of all of them can be in memory.
PASS = 8192


def last_logits(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], answers: Sequence[int]
) -> list[Tensor]:
    """What the model predicts after the last tokens of each text.

    The texts are padded on the right. The engine is told which tokens are padding, or they would
    count as seen and kept; and it meets the sparsity of the chosen level in each text by itself.
    What is before the last tokens is the prompt, where rows leave after the prompt: all
    predictions are made from what is left.

    Args:
        model: a loaded checkpoint, with its handle at `model.ctxprune`, at the level to score.
        texts: token ids, at least one text.
        answers: how many of the last tokens of each; no other logits are computed.

    Returns:
        A (tokens, vocabulary) tensor a text, in the model's dtype.

    Raises:
        CtxpruneError: the model gives no numbers.
    """
    lengths = [len(text) for text in texts]
    prompts = [length - answer for length, answer in zip(lengths, answers, strict=True)]
    first = min(prompts)
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    handle = handle_of(model)
    with torch.inference_mode(), handle.running(handle.at(lengths, prompts)):
        logits: Tensor = model(
            ids.to(input_device(model)),
            attention_mask=mask.long().to(input_device(model)),
            use_cache=False,
            logits_to_keep=ids.shape[1] - first,
        ).logits
    check_numbers(logits, "the model's predictions")
    ends = zip(logits, prompts, lengths, strict=True)
    return [of_text[start - first : end - first] for of_text, start, end in ends]


@dataclass(frozen=True)
class Likelihood:
    """How a continuation was predicted.

    Attributes:
        total: its log-likelihood, in nats. greedy: whether each of its tokens was the likeliest.
    """

    total: float
    greedy: bool


def texts_a_pass(batch_size: int | str, longest: int) -> int:
    """Texts of so many tokens that one pass reads: as many as was said, or as fill a `PASS`."""
    return max(PASS // max(longest, 1), 1) if isinstance(batch_size, str) else batch_size


def passes(lengths: Sequence[int], batch_size: int | str) -> Iterator[list[int]]:
    """Which texts share a pass: those of about the same length, the longest first.

    Args:
        lengths: tokens of each text. batch_size: texts a pass at most; `AUTO`: as many as fill it.
    """
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    start = 0
    while start < len(order):
        end = start + texts_a_pass(batch_size, lengths[order[start]])
        yield order[start:end]
        start = end


def likelihoods(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int | str = 1,
    longest: int | None = None,
) -> list[Likelihood]:
    """How likely each continuation is after its context.

    The context but for its last token, which predicts the first of the continuation, is the
    prompt. Continuations that differ in their last token alone are read once.

    Args:
        model: a loaded checkpoint, with its handle at `model.ctxprune`, at the level to score.
        pairs: token ids of each context and of its continuation; neither is empty.
        batch_size: texts a forward pass at most, or `AUTO`.
        longest: tokens that are read at most, the last ones; None: all.
    """
    shared: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        read = (*context, *continuation)[:-1]
        shared.setdefault(read if longest is None else read[-longest:], []).append(number)
    reads = list(shared)
    found: dict[int, Likelihood] = {}
    for some in passes([len(read) for read in reads], batch_size):
        texts = [reads[n] for n in some]
        answers = [max(len(pairs[n][1]) for n in shared[text]) for text in texts]
        for text, logits in zip(texts, last_logits(model, texts, answers), strict=True):
            predicted = logits.float().log_softmax(dim=-1).cpu()
            for number in shared[text]:
                said = torch.tensor(pairs[number][1])
                own = predicted[-len(said) :]
                total = float(own.gather(1, said[:, None]).sum())
                found[number] = Likelihood(total, torch.equal(own.argmax(dim=-1), said))
    return [found[number] for number in range(len(pairs))]
