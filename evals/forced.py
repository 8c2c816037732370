"""Forced survival: the speed of a pruned model whose gates were not tuned."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.pruner.engine import Handle
from ctxprune.pruner.levels import Level, prior
from ctxprune.pruner.policies import Block
from ctxprune.pruner.policies.gate import GatePolicy
from ctxprune.pruner.policies.random import draw
from ctxprune.pruner.table import Table


class ForcedPolicy(GatePolicy):
    """The gate at its full cost, but whether a token survives is drawn, once for ever.

    A token survives by the number that its position draws in its layer; the protected tokens stay
    as ever. At the end of `context` about the share `sparsity` of the tokens is gone, as far as the
    protected ones leave that possible. `length` counts these and the tokens decoded after them.
    """

    def __init__(
        self, handle: Handle, sparsity: float, context: int, *, length: int, capped: bool
    ) -> None:
        config = handle.config
        level = Level(prior(sparsity, config.context), 0.0)
        super().__init__(handle.gate_list, config, level, capped=capped)
        protected = config.protect_first + config.protect_recent
        share = max((1.0 - sparsity) * context - protected, 0.0) / max(context - protected, 1)
        position = torch.arange(length, device=self.gates[0].bias.device)
        # Drawn once: what is drawn at every step would be a cost that the gate does not have.
        draws = torch.stack([draw(position, layer) for layer in range(len(self.gates))])
        self.stays = (draws < share) | (position < config.protect_first)  # (layers, length)

    def keep(self, layer: int, table: Table, block: Block) -> Tensor:
        """(b, q, r) bool: drawn, or protected."""
        super().keep(layer, table, block)  # for its cost, not for its answer
        recent = table.held[:, None, :] > block.position[:, :, None] - self.config.protect_recent
        return self.stays[layer][table.held][:, None, :] | recent
