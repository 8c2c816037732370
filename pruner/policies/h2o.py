"""Heavy hitters: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", arXiv 2306.14048.

Half of the rows go to the newest tokens, half to those that gathered the most attention since they
were read. It differs from the paper in that all heads of a layer share their rows (the mean of
their attention counts), and that eviction happens every few tokens; with `--evict reading` also in
that the prompt is pruned while it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.policies import Policy, Request


class H2OPolicy(Policy):
    """Keeps the newest rows and those of the largest sum of attention."""

    columns = {"attention": 1}
    fresh = {"attention": 0.0}
    watches = True

    def __init__(self, request: Request) -> None:
        self.rows = request.even_rows(least=2)

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r): the sum of attention; the newer half of what stays is protected."""
        attention = held.columns["attention"]
        attention += queries.received
        recent = held.position > queries.newest - queries.stay // 2
        return attention.masked_fill(recent, torch.inf)


def make(request: Request) -> H2OPolicy:
    """H2O within the rows of a sparsity."""
    return H2OPolicy(request)
