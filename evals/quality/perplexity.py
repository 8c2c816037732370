"""Perplexity on fixed windows of tokens, with the tokens really evicted while the model reads.

The windows are cut once and used at every level, so that two perplexities differ by pruning alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError


@dataclass(frozen=True)
class Perplexity:
    """The outcome on all windows.

    Attributes:
        perplexity: exp of the mean negative log-likelihood (in nats) of the predicted tokens.
        tokens: how many were predicted: all but the first of each window.
        sparsity: share of the earlier tokens that were gone when a query looked, mean over
            layers; realised, not requested.
        cache_sparsity: share of the tokens that were gone at the end of a window (the memory).
        capped: share of the times that the cap on rows was asked at which it made some leave.
    """

    perplexity: float
    tokens: int
    sparsity: float
    cache_sparsity: float
    capped: float


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score every window in one pass, at the policy and level that the model's handle is set to.

    Args:
        model: a loaded checkpoint in eval mode, with its handle at `model.ctxprune`.
        windows: (windows, length) int64 token ids.
        batch_size: windows a forward pass.
        progress: called with (windows done, windows in all) after each pass.

    Raises:
        CtxpruneError: if there is no token to predict.
    """
    count, length = windows.shape
    if count == 0 or length < 2:
        raise CtxpruneError("the text is too short to score", "give a longer text or less context")
    loss = 0.0  # summed in double precision: a float32 sum drifts with the number of tokens
    handle = handle_of(model)
    with torch.inference_mode(), handle.measure() as usage:
        for start in range(0, count, batch_size):
            ids = windows[start : start + batch_size].to(model.device)
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            nll = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss += nll.double().sum().item()
            if progress is not None:
                progress(min(start + batch_size, count), count)
    tokens = count * (length - 1)
    return Perplexity(
        math.exp(loss / tokens), tokens, usage.sparsity, usage.cache_sparsity, usage.capped
    )
