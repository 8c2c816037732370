"""The last logits of several texts in one pass, each at the sparsity that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ctxprune.pruner.engine.handle import handle_of


def last_logits(model: PreTrainedModel, texts: Sequence[Sequence[int]], first: int) -> Tensor:
    """What the model predicts after the tokens from `first` on.

    The texts are padded on the right. The engine is told which tokens are padding, or they would
    count as seen and kept; and it meets the sparsity of the chosen level in each text by itself.

    Args:
        model: a loaded checkpoint, with its handle at `model.ctxprune`, at the level to score.
        texts: token ids, at least one text.
        first: position below the length of the longest; logits before it are not computed.

    Returns:
        (texts, longest - first, vocabulary), in the model's dtype; at padding, anything.
    """
    lengths = [len(text) for text in texts]
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    with torch.inference_mode(), handle_of(model).running(handle_of(model).at(lengths)):
        logits: Tensor = model(
            ids.to(model.device),
            attention_mask=mask.long().to(model.device),
            use_cache=False,
            logits_to_keep=ids.shape[1] - first,
        ).logits
    return logits
