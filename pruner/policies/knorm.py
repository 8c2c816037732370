"""Key norms: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2406.11430.

A key of small norm gets much attention, so the rows of the largest norm leave first. It differs
from the paper in that the heads of a layer share their rows (the mean of their norms), that no
layer is spared, and that eviction happens every few tokens, in the prompt too.
"""

from __future__ import annotations

from torch import Tensor

from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.policies import Policy, Request


class KeyNormPolicy(Policy):
    """Keeps the rows whose keys are shortest."""

    def __init__(self, request: Request) -> None:
        self.rows = request.even_rows()

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r): the mean norm of a row's keys, negative. Rotary positions leave it as it is."""
        norms: Tensor = held.key.float().norm(dim=-1)
        return -norms.mean(dim=1)


def make(request: Request) -> KeyNormPolicy:
    """Key norms within the rows of a sparsity."""
    return KeyNormPolicy(request)
