"""The last logits of several texts in one pass, each at the sparsity that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of


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
    ends = zip(logits, prompts, lengths, strict=True)
    return [of_text[start - first : end - first] for of_text, start, end in ends]
