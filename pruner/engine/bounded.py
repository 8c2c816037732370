"""What leaves a layer that is left with its window: the rows that no later query may see."""

from __future__ import annotations

from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.policies import Policy
from ctxprune.pruner.rows import Rows, interval_for, unlimited


class BoundedRows(Rows):
    """As many rows as the next query may see; they grow in between, by an eighth at most."""

    def __init__(self, sight: Sight) -> None:
        assert sight.size is not None
        super().__init__([unlimited(1, interval_for(sight.size, sight.size))])
        self._sight = sight

    def after(self, layer: int, sequence: int, seen: int) -> int:
        """Rows that stay at the step after `seen` tokens."""
        return self._sight.held(seen)


class Bounded(Policy):
    """Keeps all that is in sight; the oldest leave first."""

    def __init__(self, sight: Sight) -> None:
        self.rows = BoundedRows(sight)
