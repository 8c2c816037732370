"""Strided sparse attention: a window and every c-th token. The second baseline of arXiv 2305.15805.

The "fixed" pattern of "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509: it
differs in that all heads have the union of both halves of the pattern, and that the window slides
instead of starting anew every c tokens, since a cache cannot bring back what it dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.gate import window_of
from ctxprune.pruner.policies import Block, Policy, Request


class StridedPolicy(Policy):
    """Keeps every `stride`-th token for ever, and a window of the newest.

    Both have half of the share: the stride is 2 / (1 - sparsity), and the window has the width that
    gives the requested sparsity at the length of the text.
    """

    def __init__(self, request: Request) -> None:
        share = 1.0 - request.sparsity
        self.stride = max(2, round(2.0 / share))
        # Of the tokens outside of the window, 1 in `stride` stays as well.
        recent = max(share - 1.0 / self.stride, 0.0) / (1.0 - 1.0 / self.stride)
        widths = [max(1, round(window_of(1.0 - recent, context))) for context in request.contexts]
        self.widths = torch.tensor(widths, device=request.gates[0].bias.device)[:, None, None]

    def keep(self, layer: int, table: Table, block: Block) -> Tensor:
        """(b, q, r) bool: in the window, or at a multiple of the stride."""
        row, query = table.held[:, None, :], block.position[:, :, None]
        return (query - row <= self.widths) | (row % self.stride == 0)

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): the oldest leave first, the strided ones after all others."""
        strided = table.held % self.stride == 0
        return (table.held + torch.where(strided, newest + 1, 0)).double()


def make(request: Request) -> StridedPolicy:
    """The pattern for a sparsity."""
    return StridedPolicy(request)
