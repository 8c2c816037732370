"""Local attention: the newest tokens stay. The first baseline of arXiv 2305.15805."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxprune.pruner.gate import window_of
from ctxprune.pruner.policies import Block, Policy, Request
from ctxprune.pruner.table import Table


class WindowPolicy(Policy):
    """Keeps the first `sinks` tokens and a window of the newest.

    With a known context the window has the fixed width that gives the requested sparsity there;
    without, it holds the requested share of the tokens seen so far.
    """

    def __init__(self, request: Request, sinks: int = 0) -> None:
        self.sinks = sinks
        self.share = 1.0 - request.sparsity
        self.width: int | None = None
        if request.context is not None:
            self.width = _width(request.sparsity, request.context, sinks)

    def keep(self, layer: int, table: Table, block: Block) -> Tensor:
        """(b, q, r) bool: age at most the window's width, or a sink."""
        row, query = table.held[:, None, :], block.position[:, :, None]
        age = query - row
        if self.width is not None:
            recent = age <= self.width
        else:
            # k earlier tokens were seen; the sinks are part of the share.
            recent = age <= (query * self.share - self.sinks).ceil().clamp_min(1)
        return recent | (row < self.sinks)

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): the oldest leave first, the sinks never."""
        return table.held.double().masked_fill(table.held < self.sinks, torch.inf)


def _width(sparsity: float, context: int, sinks: int) -> int:
    """Width at which window and sinks together drop the share `sparsity` of the pairs."""
    kept = (1.0 - sparsity) * context * (context - 1) / 2.0
    width = window_of(sparsity, context)
    # A sink older than the window is one pair more for each later query.
    for _ in range(20):
        beyond = sum(max(context - 1 - width - j, 0.0) for j in range(sinks))
        share = max(1.0 - (kept - beyond) / (context * (context - 1) / 2.0), 0.0)
        width = window_of(min(share, 1.0), context)
    return max(1, math.floor(width + 0.5))


def make(request: Request) -> WindowPolicy:
    """The plain window."""
    return WindowPolicy(request)
