"""The learned gate: "Dynamic Context Pruning", arXiv 2305.15805, decisions taken hard: s > 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.gate import Gate, free_pairs
from ctxprune.pruner.levels import Level, level_of
from ctxprune.pruner.policies import Block, Request
from ctxprune.pruner.table import Table


class GatePolicy:
    """Keeps row j at query k while every score s[., j] since then was above 0."""

    columns = ("interaction_key",)

    def __init__(self, gates: Sequence[Gate], config: PruneConfig, level: Level) -> None:
        self.gates = gates
        self.config = config
        self.level = level

    def annotate(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Interaction query and key, (b, n, rank) each."""
        query, key = self.gates[layer].interact(hidden)
        return {"interaction_query": query, "interaction_key": key}

    def keep(self, layer: int, table: Table, block: Block) -> Tensor:
        """(b, q, r) bool: s > 0, or protected."""
        assert table.position is not None
        position = table.position
        scores = self.gates[layer].scores(
            block.notes["interaction_query"],
            table.columns["interaction_key"][:, 0],
            block.position,
            position,
            self.level.log_window,
            self.level.shift,
        )
        free = free_pairs(
            block.position, position, self.config.protect_first, self.config.protect_recent
        )
        return torch.logical_or(scores > 0, ~free)


def make(request: Request) -> GatePolicy:
    """The gate at a calibrated level, or between two of them."""
    if not request.config.levels:
        raise CtxpruneError(
            "this model was converted but not tuned, so its gates prune nothing yet",
            "run `ctxprune tune --sparsity 0.8` first, or use `--policy sink`",
        )
    return GatePolicy(request.gates, request.config, level_of(request.config, request.sparsity))
