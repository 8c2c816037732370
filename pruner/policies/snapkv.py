"""SnapKV: "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.

The newest tokens are a window of observers: they stay, and of the older rows those stay which the
observers attended to most, pooled over neighbouring tokens so that whole clauses survive. The
paper does this once, at the end of the prompt, head by head (`--evict prompt` is as near as we
come). It differs here in that it is done again every few tokens (those since the last time are the
observers), and that the heads of a layer share their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.policies import Policy, Request

# Rows, in the order of their positions, that the votes are pooled over.
KERNEL = 5


class SnapKVPolicy(Policy):
    """Keeps the observers, and the rows with the most of their pooled attention."""

    watches = True

    def __init__(self, request: Request) -> None:
        self.rows = request.even_rows(least=2)

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r): ranks of the pooled votes; observers, or half of fewer rows, are protected."""
        order = held.position.argsort(dim=1)
        votes = queries.received.gather(1, order)
        # Free slots come first and have no votes to give.
        votes = votes.masked_fill(held.position.gather(1, order) < 0, 0.0)
        pooled = F.max_pool1d(votes[:, None], KERNEL, stride=1, padding=KERNEL // 2)[:, 0]
        # Neighbours often have the same vote: the oldest leave first.
        rank = pooled.argsort(dim=1, stable=True).argsort(dim=1).to(pooled.dtype)
        scores = torch.empty_like(pooled).scatter_(1, order, rank)
        observers = (queries.position >= 0).sum(dim=1, keepdim=True).clamp_max(queries.stay // 2)
        return scores.masked_fill(held.position > queries.newest - observers, torch.inf)


def make(request: Request) -> SnapKVPolicy:
    """SnapKV within the rows of a sparsity."""
    return SnapKVPolicy(request)
