"""SnapKV: "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.

The newest tokens are a window of observers: they stay, and of the older rows those stay which the
observers attended to most, pooled over neighbouring tokens so that whole clauses survive. The
paper does this once, at the end of the prompt, head by head, with an unpruned cache until then. It
differs here in that it is done again at borders (the tokens since the last one are the observers),
while the prompt is read and while text is written, and that the heads of a layer share their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.policies import Block, Policy, Request

# Rows, in the order of their positions, that the votes are pooled over.
KERNEL = 5


class SnapKVPolicy(Policy):
    """Keeps the observers, and the rows with the most of their pooled attention."""

    columns = ("votes",)
    needs_weights = True

    def __init__(self, request: Request) -> None:
        self.budget = self._even = request.even_budget(least=2)

    def observe(self, layer: int, table: Table, block: Block, weights: Tensor) -> None:
        """Add up the votes of this period; the first query of a period begins a new count."""
        begins = (block.position % self._even.period(layer) == 0) & (block.position >= 0)
        first = begins.any(dim=1, keepdim=True)
        votes = table.vector("votes")
        votes.copy_(votes.masked_fill(first, 0.0) + weights.sum(dim=1))

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): pooled votes; the observers, or half of a smaller budget, are protected."""
        order = table.held.argsort(dim=1)
        votes = table.vector("votes").gather(1, order)
        # Free slots come first and have no votes to give.
        votes = votes.masked_fill(table.held.gather(1, order) < 0, 0.0)
        pooled = F.max_pool1d(votes[:, None], KERNEL, stride=1, padding=KERNEL // 2)[:, 0]
        scores = torch.empty_like(pooled).scatter_(1, order, pooled)
        recent = table.held > newest - torch.minimum(limit // 2, self._even.period(layer))
        return scores.masked_fill(recent, torch.inf)


def make(request: Request) -> SnapKVPolicy:
    """SnapKV within the budget of a sparsity."""
    return SnapKVPolicy(request)
