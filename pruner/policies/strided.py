"""Strided sparse attention: a window and every c-th token. The second baseline of arXiv 2305.15805.

The "fixed" pattern of "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509: it
differs in that all heads have the union of both halves of the pattern, that the window slides
instead of starting anew every c tokens, since a cache cannot bring back what it dropped, and that
rows leave every few tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.policies import Policy, Request
from ctxprune.pruner.policies.window import SHORT
from ctxprune.pruner.rows import window_of


class StridedPolicy(Policy):
    """Keeps every `stride`-th token for ever, and a window of the newest.

    The stride is such that the tokens kept for ever take half of the rows at the end of the text.
    """

    def __init__(self, request: Request) -> None:
        self.rows = request.even_rows(longest=SHORT)
        strides = [
            max(2, math.ceil(2 * context / max(window_of(request.sparsity, context), 1.0)))
            for context in request.contexts
        ]
        self.strides = torch.tensor(strides, device=request.gates[0].bias.device)[:, None]

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r): the oldest leave first, the strided ones after all others."""
        strides = self.strides if len(self.strides) == 1 else self.strides[list(queries.members)]
        strided = held.position % strides.to(held.position.device) == 0
        return (held.position + torch.where(strided, queries.newest + 1, 0)).double()


def make(request: Request) -> StridedPolicy:
    """The pattern for a sparsity."""
    return StridedPolicy(request)
