"""Forced survival: the speed of a pruned model whose gates were not tuned."""

from __future__ import annotations

from torch import Tensor

from ctxprune.pruner.engine.handle import Handle
from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.policies import Request
from ctxprune.pruner.policies.gate import GatePolicy
from ctxprune.pruner.policies.random import RandomPolicy


class ForcedPolicy(GatePolicy):
    """The gate at its full cost, but which tokens leave is drawn.

    All layers hold equally many rows, those that the policy `random` would hold.
    """

    def __init__(self, handle: Handle, sparsity: float, context: int) -> None:
        request = Request(sparsity, (context,), handle.config, handle.gate_list)
        self._random = RandomPolicy(request)
        super().__init__(handle.gate_list, handle.config, None)
        if sparsity > 0.0:
            self.budget = self._random.budget

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r): the token's number; the margin is worked out beside it."""
        super().score(layer, table, newest, limit)  # for its cost, not for its answer
        return self._random.score(layer, table, newest, limit)
