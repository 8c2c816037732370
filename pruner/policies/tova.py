"""Token omission via attention: "Transformers are Multi-State RNNs", arXiv 2401.06104.

The rows that the newest query attends to least leave first; nothing is protected. It differs from
the paper in that eviction happens every few tokens, by the attention of the last one; with
`--evict reading` also in that the prompt is pruned while it is read. Heads share their rows, as in
the paper.
"""

from __future__ import annotations

from torch import Tensor

from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.policies import Policy, Request


class TovaPolicy(Policy):
    """Keeps the rows of the largest attention weight at the newest query."""

    watches = True

    def __init__(self, request: Request) -> None:
        self.rows = request.even_rows()

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r): the newest query's attention."""
        last = queries.position.argmax(dim=1)[:, None, None].expand(-1, 1, held.key.shape[2])
        return queries.weights.gather(1, last)[:, 0]


def make(request: Request) -> TovaPolicy:
    """TOVA within the rows of a sparsity."""
    return TovaPolicy(request)
