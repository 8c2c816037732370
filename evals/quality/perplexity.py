"""Perplexity on fixed windows of tokens, with the tokens really evicted while the model reads.

The windows are cut once and used at every level, so that two perplexities differ by pruning alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ctxprune.evals.quality.scoring import PASS, texts_a_pass
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

# Nats a token whose exponential is still a number.
MOST = 700.0


@dataclass(frozen=True)
class Perplexity:
    """The outcome on all windows.

    Attributes:
        perplexity: exp of the mean negative log-likelihood (in nats) of the predicted tokens.
        tokens: how many were predicted: all but the first, or the prompt, of each window.
        sparsity: share of the earlier tokens that were gone when a query looked, mean over
            layers; realised, not requested.
        cache_sparsity: share of the tokens that were gone at the end of a window (the memory).
        rows: that a layer held at the end of a window, on average; None if dense.
        capped: share of the times that the cap on rows was asked at which it made some leave.
        nll: mean negative log-likelihood of each window, in nats a token.
    """

    perplexity: float
    tokens: int
    sparsity: float
    cache_sparsity: float
    rows: float | None
    capped: float
    nll: tuple[float, ...]


def perplexity(
    model: PreTrainedModel, windows: Tensor, batch_size: int | str = 1, prompt: int = 1
) -> Perplexity:
    """Score every window in one pass, at the policy and level that the model's handle is set to.

    Args:
        model: a loaded checkpoint in eval mode, with its handle at `model.ctxprune`.
        windows: (windows, length) int64 token ids.
        batch_size: windows a forward pass; fewer where they have more than `PASS` tokens, and as
            many as have them if `auto`.
        prompt: tokens of each window that are read and not scored.

    Raises:
        CtxpruneError: if there is no token to predict, or a loss is no number or beyond `MOST`.
    """
    count, length = windows.shape
    if count == 0 or length <= prompt:
        raise CtxpruneError("the text is too short to score", "give a longer text or less context")
    losses: list[float] = []
    at_once = min(texts_a_pass(batch_size, length), max(PASS // length, 1))
    with torch.inference_mode(), handle_of(model).measure() as usage:
        for some in windows.split(at_once):
            ids = some.to(input_device(model))
            logits = model(ids, use_cache=False, logits_to_keep=length - prompt + 1).logits
            for predicted, said in zip(logits[:, :-1], ids[:, prompt:], strict=True):
                nll = cross_entropy(predicted.float(), said, reduction="none")
                # in double precision: a float32 sum drifts with the number of tokens
                losses.append(nll.double().mean().item())
                if not losses[-1] <= MOST:
                    raise CtxpruneError(
                        f"the loss on window {len(losses)} is {losses[-1]:g} nats a token, so "
                        "there is no perplexity",
                        "its numbers overflow: give `--dtype float32`, or tune the model again",
                    )
    return Perplexity(
        math.exp(math.fsum(losses) / count),
        count * (length - prompt),
        usage.sparsity,
        usage.cache_sparsity,
        usage.rows,
        usage.capped_share,
        tuple(losses),
    )
