"""Local attention: the newest tokens stay. The first baseline of arXiv 2305.15805."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.policies import Policy, Request

# Tokens between two eviction steps at most: a window that slides in long strides would be a weaker
# baseline than one that slides with every token.
SHORT = 2


class WindowPolicy(Policy):
    """Keeps the first `sinks` tokens and a window of the newest."""

    def __init__(self, request: Request, sinks: int = 0) -> None:
        self.sinks = sinks
        self.rows = request.even_rows(least=sinks + 1, longest=SHORT)

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r): the oldest leave first, the sinks never."""
        return held.position.double().masked_fill(held.position < self.sinks, torch.inf)


def make(request: Request) -> WindowPolicy:
    """The plain window."""
    return WindowPolicy(request)
