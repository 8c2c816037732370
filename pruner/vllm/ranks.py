"""The gate's policy where the heads of a layer are spread over several devices.

Each rank has what all heads tell before it chooses, so that all of them drop the same rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ctxprune.pruner.engine.page import Queries
from ctxprune.pruner.policies.gate import GatePolicy


class RankedGatePolicy(GatePolicy):
    """The same, with what its own heads tell added up over all ranks, at eviction steps alone.

    Args:
        alone: the policy of one rank. total: the sum of a tensor over all of them, `ranks` many.
    """

    def __init__(self, alone: GatePolicy, total: Callable[[Tensor], Tensor], ranks: int) -> None:
        assert alone.rows is not None
        super().__init__(alone.gates, alone.config, alone.rows)
        self._total, self._ranks = total, ranks

    def received(self, queries: Queries) -> Tensor:
        """(s, r): attention received, the sum over the heads of all ranks."""
        return self._total(super().received(queries))

    def size(self, queries: Queries) -> Tensor:
        """(s, q): norms of values, the mean over the heads of all ranks."""
        return self._total(super().size(queries)) / self._ranks
