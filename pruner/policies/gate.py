"""The learned gate: "Dynamic Context Pruning", arXiv 2305.15805; the least scores leave first.

It differs from the paper in how the threshold is set: a layer holds the number of rows that
calibration found it to need, and the rows of the least score leave, after every few tokens. So a
sparsity is met exactly, on any text, and all sequences hold equally many rows. And in what is
scored: beside the margin of survival, which foretells, the attention that a row has received so
far, as heavy hitters have it ("H2O", arXiv 2306.14048), times the norm of its value ("VATP", arXiv
2406.12335), for attention to a small value moves little.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxprune.pruner.budget import Budget
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.gate import Gate, log_used, no_autocast, value_size
from ctxprune.pruner.levels import layer_windows
from ctxprune.pruner.policies import Block, Policy, Request


class GatePolicy(Policy):
    """Keeps the rows of the largest margin (the least score that any later query gave them), plus
    `attention_bonus` times the log of the attention received and of the norm of the value.

    It reads the parameters of the gates once.

    Args:
        budget: of rows; None: all may stay, and the margins only serve a cap.
    """

    digests = True

    def __init__(self, gates: Sequence[Gate], config: PruneConfig, budget: Budget | None) -> None:
        self.gates = gates
        self.config = config
        self.budget = budget
        self.needs_weights = config.attention_bonus > 0.0
        received = ("attention",) if self.needs_weights else ()
        self.columns = ("interaction_key", "margin", *received)
        self._projections = [
            torch.cat([gate.query.weight, gate.key.weight]).detach() for gate in gates
        ]
        self._tables: dict[int, Tensor] = {}

    def annotate(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Interaction query and key, (b, n, rank) each, a margin that nothing lowered yet, and no
        attention received.
        """
        projection = self._projections[layer]
        with no_autocast(hidden.device):
            both = F.linear(hidden.to(projection.dtype), projection).to(hidden.dtype)
        query, key = both.chunk(2, dim=-1)
        margin = both.new_full((*both.shape[:2], 1), torch.inf, dtype=projection.dtype)
        notes = {"interaction_query": query, "interaction_key": key, "margin": margin}
        if self.needs_weights:
            notes["attention"] = torch.zeros_like(margin)
        return notes

    def observe(self, layer: int, table: Table, block: Block, weights: Tensor) -> None:
        """Add up what each row received, from its own query on."""
        table.vector("attention").add_(weights.sum(dim=1))

    def digest(self, layer: int, table: Table, block: Block) -> None:
        """Lower the margins by the scores of these queries."""
        content = self.gates[layer].content(
            block.notes["interaction_query"], table.column("interaction_key")[:, 0]
        )
        age = block.position[:, :, None] - table.held[:, None, :]
        forgetting = self._forgetting(layer, block.seen)[age.clamp_min_(0)]
        margin = table.vector("margin")
        margin.copy_(torch.minimum(margin, (content + forgetting).amin(dim=1)))

    def _forgetting(self, layer: int, longest: int) -> Tensor:
        """What the score has from each age up to `longest`; +inf for the protected newest."""
        known = self._tables.get(layer)
        if known is None or len(known) <= longest:
            gate = self.gates[layer]
            age = torch.arange(2 * longest + 256, device=gate.slope.device)
            # The window and the shift are the same for all rows, so they change no order.
            known = gate.forgetting(age, 0.0, 0.0).detach()
            known[: max(self.config.protect_recent, 1)] = torch.inf
            self._tables[layer] = known
        return known

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): margin and bonus, +inf for attention sinks."""
        score = table.vector("margin")
        if self.needs_weights:
            size = value_size(table.column("value")).to(score.dtype)
            used = log_used(table.vector("attention"), size)
            score = score + self.config.attention_bonus * used
        return score.masked_fill(table.held < self.config.protect_first, torch.inf)


def make(request: Request) -> GatePolicy:
    """The gate within the budget of a sparsity; at 0 it only serves a cap."""
    config = request.config
    if request.sparsity == 0.0:
        return GatePolicy(request.gates, config, None)
    if not config.levels:
        raise CtxpruneError(
            "this model was converted but not tuned, so its gates prune nothing yet",
            "run `ctxprune tune --sparsity 0.8` first, or use `--policy sink`",
        )
    shares = [layer_windows(config, request.sparsity, context) for context in request.contexts]
    least = config.protect_first + config.protect_recent
    return GatePolicy(request.gates, config, request.budget(shares, least))
