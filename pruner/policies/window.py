"""Local attention: the newest tokens stay. The first baseline of arXiv 2305.15805."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.gate import window_of
from ctxprune.pruner.policies import Block, Policy, Request


class WindowPolicy(Policy):
    """Keeps the first `sinks` tokens and a window of the newest.

    The window has the width that gives the requested sparsity at the length of the text.
    """

    def __init__(self, request: Request, sinks: int = 0) -> None:
        self.sinks = sinks
        device = request.gates[0].bias.device
        widths = [_width(request.sparsity, context, sinks) for context in request.contexts]
        self.widths = torch.tensor(widths, device=device)[:, None, None]

    def keep(self, layer: int, table: Table, block: Block) -> Tensor:
        """(b, q, r) bool: age at most the window's width, or a sink."""
        row, query = table.held[:, None, :], block.position[:, :, None]
        return (query - row <= self.widths) | (row < self.sinks)

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): the oldest leave first, the sinks never."""
        return table.held.double().masked_fill(table.held < self.sinks, torch.inf)


def _width(sparsity: float, context: int, sinks: int) -> int:
    """Width at which window and sinks together drop the share `sparsity` of the pairs."""
    pairs = context * (context - 1) / 2.0
    if pairs == 0.0:
        return 1
    kept = (1.0 - sparsity) * pairs
    width = window_of(sparsity, context)
    # A sink older than the window is one pair more for each later query.
    for _ in range(20):
        beyond = sum(max(context - 1 - width - j, 0.0) for j in range(sinks))
        share = max(1.0 - (kept - beyond) / pairs, 0.0)
        width = window_of(min(share, 1.0), context)
    return max(1, math.floor(width + 0.5))


def make(request: Request) -> WindowPolicy:
    """The plain window."""
    return WindowPolicy(request)
