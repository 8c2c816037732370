"""Token omission via attention: "Transformers are Multi-State RNNs", arXiv 2401.06104.

The rows that the newest query attends to least leave first; nothing is protected. It differs from
the paper in that the prompt is pruned while it is read, and that eviction happens at borders, by
the attention of their last token. Heads share their rows, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.policies import Block, Policy, Request


class TovaPolicy(Policy):
    """Keeps the rows of the largest attention weight at the newest query."""

    columns = ("attention",)
    needs_weights = True

    def __init__(self, request: Request) -> None:
        self.budget = request.even_budget()

    def observe(self, layer: int, table: Table, block: Block, weights: Tensor) -> None:
        """Remember the weights of each sequence's newest query."""
        last = block.position.argmax(dim=1)[:, None, None].expand(-1, 1, weights.shape[2])
        newest = weights.gather(1, last)[:, 0]
        column = table.vector("attention")
        read = (block.position >= 0).any(dim=1, keepdim=True)
        column.copy_(torch.where(read, newest, column))

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): the newest query's attention."""
        return table.vector("attention")


def make(request: Request) -> TovaPolicy:
    """TOVA within the budget of a sparsity."""
    return TovaPolicy(request)
