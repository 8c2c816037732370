"""Heavy hitters: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", arXiv 2306.14048.

Half of the budget goes to the newest tokens, half to those that gathered the most attention since
they were read. It differs from the paper in that all heads of a layer share their rows (the mean of
their attention counts), that the prompt is pruned while it is read, and that eviction happens at
borders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.policies import Block, Policy, Request


class H2OPolicy(Policy):
    """Keeps the newest rows and those of the largest sum of attention."""

    columns = ("attention",)
    needs_weights = True

    def __init__(self, request: Request) -> None:
        self.budget = request.even_budget(least=2)

    def observe(self, layer: int, table: Table, block: Block, weights: Tensor) -> None:
        """Add up what each row got."""
        table.vector("attention").add_(weights.sum(dim=1))

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): the sum of attention; the newer half of the budget is protected."""
        recent = table.held > newest - limit // 2
        return table.vector("attention").masked_fill(recent, torch.inf)


def make(request: Request) -> H2OPolicy:
    """H2O within the budget of a sparsity."""
    return H2OPolicy(request)
