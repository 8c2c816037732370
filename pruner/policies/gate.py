"""The learned gate: "Dynamic Context Pruning", arXiv 2305.15805; the least scores leave first.

It differs from the paper in how the threshold is set: a layer holds the number of rows that
calibration found it to need, and the rows of the least score leave, after every few tokens. So a
sparsity is met exactly, on any text, and all sequences hold equally many rows. And in what is
scored: beside the margin of survival, which is read off the hidden states, the attention that a row
has received so far, as heavy hitters have it ("H2O", arXiv 2306.14048), times the norm of its value
("VATP", arXiv 2406.12335), for attention to a small value moves little.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.gate import Gate, log_used, value_size
from ctxprune.pruner.policies import Policy, Request
from ctxprune.pruner.rows import Rows, layer_windows


class GatePolicy(Policy):
    """Keeps the rows of the largest margin (the least score that any later query gave them), plus
    `attention_bonus` times the log of the attention received and of the norm of the value.
    """

    def __init__(self, gates: Sequence[Gate], config: PruneConfig, rows: Rows) -> None:
        self.gates = gates
        self.config = config
        self.rows = rows
        self.watches = config.attention_bonus > 0.0
        received = {"received": 1, "size": 1} if self.watches else {}
        self.columns = {"interaction_key": config.rank, "margin": 1, **received}
        self.fresh = {"margin": torch.inf, **({"received": 0.0} if self.watches else {})}

    def annotate(self, layer: int, hidden: Tensor) -> Tensor:
        """Interaction query and key, side by side: (b, n, 2 rank)."""
        return self.gates[layer].features(hidden)

    def remember(self, layer: int, held: Held, queries: Queries) -> None:
        """Interaction keys, and the norms of values."""
        assert queries.features is not None
        queries.put("interaction_key", queries.features.chunk(2, dim=-1)[1])
        if self.watches:
            queries.put("size", self.size(queries).to(held.numbers.dtype))

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r): margin and bonus, +inf for attention sinks."""
        assert queries.features is not None
        query, _ = queries.features.chunk(2, dim=-1)
        age = queries.position[:, :, None] - held.position[:, None, :]
        # The window, the bias and the shift are the same for all rows: they change no order.
        scores = self.gates[layer].ranking(query, held.columns["interaction_key"], age)
        nobody = age < max(self.config.protect_recent, 1)
        if isinstance(queries.first, Tensor):
            nobody |= (queries.position < 0)[:, :, None]
        margin = held.columns["margin"]
        least = scores.masked_fill_(nobody, torch.inf).amin(dim=1).to(margin.dtype)
        score: Tensor = margin.copy_(torch.minimum(margin, least))
        if self.watches:
            received, size = held.columns["received"], held.columns["size"]
            received += self.received(queries)
            score = score + self.config.attention_bonus * log_used(received, size)
        return score.masked_fill(held.position < self.config.protect_first, torch.inf)

    def received(self, queries: Queries) -> Tensor:
        """(s, r): the attention that each row got, the sum over heads."""
        return queries.received

    def size(self, queries: Queries) -> Tensor:
        """(s, q): the norms of their own values, the mean over heads."""
        return value_size(queries.own(queries.held.value))


def make(request: Request) -> GatePolicy:
    """The gate within the rows of a sparsity; at 0 it only serves a cap."""
    config = request.config
    if request.sparsity == 0.0:
        return GatePolicy(request.gates, config, request.even_rows())
    if not config.levels:
        raise CtxpruneError(
            "this model was converted but not tuned, so its gates prune nothing yet",
            "run `ctxprune tune --sparsity 0.8` first, or use `--policy sink`",
        )
    shares = [layer_windows(config, request.sparsity, context) for context in request.contexts]
    least = config.protect_first + config.protect_recent
    return GatePolicy(request.gates, config, request.rows(shares, least))
