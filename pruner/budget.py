"""How many rows a policy that goes by score may hold, and how often it is asked.

Such a policy holds as many rows at any length: of all ways to keep a share of the pairs j < k of a
text, an even one costs least, since the first rows of a cache are worth most (docs/decisions.md).
Rows leave at borders, after every `period`-th token of a sequence, and grow by one a token in
between; the share is met with that counted in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ctxprune.pruner.config import PERIOD
from ctxprune.pruner.gate import window_of

# The longest period of a budget: a block of as many queries is read at full speed.
LONGEST = 128


def cap_period(max_rows: int) -> int:
    """Tokens of a sequence between two times that a cap on rows is enforced, a divisor of `PERIOD`.

    So many rows below the cap are left free for the tokens in between: at most a sixteenth of it.
    """
    return _power_of_two(max_rows / 16, PERIOD)


class Budget:
    """Rows that the sequences of a batch may hold, layer by layer.

    Args:
        sparsity: share of the pairs j < k to drop, over all layers, in [0, 1).
        contexts: length of each text, for which the sparsity is met; one of them serves any batch.
        shares: what the layers hold in proportion to each other, for each of the contexts.
        least: rows that are never refused.
        device: of what the budget says.

    Attributes:
        period: (b, 1) int64, tokens between two borders of each sequence.
        periods: the same, for the host.
    """

    def __init__(
        self,
        sparsity: float,
        contexts: Sequence[int],
        shares: Sequence[tuple[float, ...]],
        least: int = 1,
        device: torch.device | None = None,
    ) -> None:
        pairs = zip(contexts, shares, strict=True)
        plans = [_plan(sparsity, context, share, least) for context, share in pairs]
        self.periods = [period for period, _ in plans]
        self.period = torch.tensor(self.periods, device=device)[:, None]
        self._rows = torch.tensor([rows for _, rows in plans], device=device).T[:, :, None]

    def after(self, layer: int) -> Tensor:
        """Rows (b, 1) int64 that may stay at a border."""
        return self._rows[layer]


@lru_cache(maxsize=65536)
def _plan(
    sparsity: float, context: int, shares: tuple[float, ...], least: int
) -> tuple[int, tuple[int, ...]]:
    """The period, and the rows of each layer at a border."""
    window = window_of(sparsity, context)
    # Between borders rows come and go by a period: no more than half of the smallest layer's.
    smallest = window * min(shares) * len(shares) / sum(shares)
    period = _power_of_two(min(window / 4, smallest / 2), LONGEST)
    earlier = torch.arange(context)
    border = earlier // period * period
    wanted = (1.0 - sparsity) * float(earlier.sum()) * len(shares)
    between = float((earlier - border).sum()) * len(shares)
    held = torch.tensor(shares, dtype=torch.float64)
    # Rounded up or down layer by layer, so that few rows can still meet a share exactly.
    steps = (torch.arange(len(shares), dtype=torch.float64) * 0.6180339887498949 + 0.5) % 1.0
    # Rows that no border reaches count for nothing.
    most = max(int(border[-1]), least) if context else least

    def rows(scale: float) -> Tensor:
        return (held * scale + steps).floor().clamp(least, most).long()

    def excess(scale: float) -> float:
        return float(torch.minimum(rows(scale)[:, None], border).sum()) + between - wanted

    low, high = 0.0, most / max(min(shares), 1e-6) + 1.0
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (low, scale) if excess(scale) > 0 else (scale, high)
    nearest = min(low, high, key=lambda scale: abs(excess(scale)))
    return period, tuple(rows(nearest).tolist())


def _power_of_two(number: float, most: int) -> int:
    """The largest one that is at most a number, in [1, most]; `most` is one itself."""
    period = most
    while period > 1 and period > number:
        period //= 2
    return period
