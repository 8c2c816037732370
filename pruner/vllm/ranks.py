"""The gate's policy where the heads of a layer are spread over several devices.

Each rank has the scores of all heads before it chooses, so that all of them drop the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.page import Queries
from ctxprune.pruner.gate import Gate
from ctxprune.pruner.policies.gate import GatePolicy
from ctxprune.pruner.rows import Rows


class RankedGatePolicy(GatePolicy):
    """The same, with what its own heads tell added up over all ranks, at eviction steps alone.

    Args:
        total: the sum of a tensor over the ranks. ranks: how many there are.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        config: PruneConfig,
        rows: Rows,
        total: Callable[[Tensor], Tensor],
        ranks: int,
    ) -> None:
        super().__init__(gates, config, rows)
        self._total, self._ranks = total, ranks

    def received(self, queries: Queries) -> Tensor:
        """(s, r): attention received, the sum over the heads of all ranks."""
        return self._total(super().received(queries))

    def size(self, queries: Queries) -> Tensor:
        """(s, q): norms of values, the mean over the heads of all ranks."""
        return self._total(super().size(queries)) / self._ranks
