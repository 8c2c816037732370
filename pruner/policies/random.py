"""Random rows, beside attention sinks and the newest: what any choice of tokens has to beat.

Each token of each layer draws a number once, from its position, and the least numbers leave first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.policies import Policy, Request


class RandomPolicy(Policy):
    """Keeps the protected tokens of the model's configuration, and any others."""

    def __init__(self, request: Request) -> None:
        self.first = max(request.config.protect_first, 1)
        self.recent = request.config.protect_recent
        self.rows = request.even_rows(self.first + self.recent)

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r): the token's number in [0, 1)."""
        position = held.position
        protected = (position < self.first) | (position > queries.newest - self.recent)
        return draw(position, layer).masked_fill(protected, torch.inf)


def draw(position: Tensor, layer: int) -> Tensor:
    """A number in [0, 1), float32, for each int64 position: the same for every sequence."""
    # Two rounds of a multiplicative hash: one leaves neighbours in even steps.
    mixed = (position * 2654435761 + layer * 40503 + 12345) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 13)).float() / 2.0**32


def make(request: Request) -> RandomPolicy:
    """Random rows within those of a sparsity."""
    return RandomPolicy(request)
