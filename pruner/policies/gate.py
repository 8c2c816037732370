"""The learned gate: "Dynamic Context Pruning", arXiv 2305.15805, decisions taken hard: s > 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.gate import Gate
from ctxprune.pruner.levels import Level, level_of, prior
from ctxprune.pruner.policies import Block, Policy, Request
from ctxprune.pruner.table import Table


class GatePolicy(Policy):
    """Keeps row j at query k while every score s[., j] since then was above 0.

    It reads the parameters of the gates once.

    Args:
        capped: rows also carry their margin, the least score so far, by which a cap on rows
            chooses who leaves.
        drops: False: the scores decide nothing but that order.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        config: PruneConfig,
        level: Level,
        *,
        capped: bool = False,
        drops: bool = True,
    ) -> None:
        self.gates = gates
        self.config = config
        self.level = level
        self.drops = drops
        self._tables: dict[int, Tensor] = {}
        self.columns = ("interaction_key", "margin") if capped else ("interaction_key",)

    def annotate(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Interaction query and key, (b, n, rank) each."""
        query, key = self.gates[layer].interact(hidden)
        notes = {"interaction_query": query, "interaction_key": key}
        if "margin" in self.columns:
            dtype = self.gates[layer].bias.dtype
            notes["margin"] = torch.full_like(hidden[..., :1], torch.inf, dtype=dtype)
        return notes

    def keep(self, layer: int, table: Table, block: Block) -> Tensor | None:
        """(b, q, r) bool: s > 0, or protected; anything where the row is later than the query."""
        row = table.held[:, None, :]
        age = block.position[:, :, None] - row
        content = self.gates[layer].content(
            block.notes["interaction_query"], table.column("interaction_key")[:, 0]
        )
        capped = "margin" in self.columns
        if capped:
            # A later row has a negative age; the newest tokens are as little in question.
            age.clamp_min_(0)
        needed = self._needed(layer, block.seen)[age]
        sink = row < self.config.protect_first
        if capped:
            margin = table.column("margin")[:, 0, :, 0]
            least = (content - needed).masked_fill(sink, torch.inf).amin(dim=1)
            margin.copy_(torch.minimum(margin, least))
        return (content > needed) | sink if self.drops else None

    def _needed(self, layer: int, longest: int) -> Tensor:
        """What the content has to exceed at all ages up to `longest`: minus `Gate.forgetting`.

        -inf for the protected newest tokens. A difference is above 0 exactly where the one number
        is above the other, so these are the decisions of s > 0.
        """
        known = self._tables.get(layer)
        if known is None or len(known) <= longest:
            gate = self.gates[layer]
            age = torch.arange(2 * longest + 256, device=gate.slope.device)
            known = -gate.forgetting(age, self.level.log_window, self.level.shift).detach()
            known[: max(self.config.protect_recent, 1)] = -torch.inf
            self._tables[layer] = known
        return known

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): the margin of survival, +inf while nothing could drop the token yet."""
        return table.column("margin")[:, 0, :, 0]


def make(request: Request) -> GatePolicy:
    """The gate at a calibrated level, or between two of them; at 0 it only serves a cap."""
    config = request.config
    if request.sparsity == 0.0:
        level = Level(prior(0.0, config.context), 0.0)
    elif config.levels:
        level = level_of(config, request.sparsity)
    else:
        raise CtxpruneError(
            "this model was converted but not tuned, so its gates prune nothing yet",
            "run `ctxprune tune --sparsity 0.8` first, or use `--policy sink`",
        )
    return GatePolicy(
        request.gates,
        config,
        level,
        capped=request.max_rows is not None,
        drops=request.sparsity > 0.0,
    )
