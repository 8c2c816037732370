"""How many rows a policy that goes by score may hold, and how often it is asked.

Such a policy holds as many rows at any length: of all ways to keep a share of the pairs j < k of a
text, an even one costs least, since the first rows of a cache are worth most (docs/decisions.md).
Rows leave at borders, after every so many tokens of a sequence, and grow by one a token in between;
the share is met with that counted in. A layer of few rows has its borders close together, one of
many reads long blocks at full speed.
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
        periods: tokens between two borders, layer by layer: of each sequence.
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
        self.periods = list(zip(*(periods for periods, _ in plans), strict=True))
        self._periods = torch.tensor(self.periods, device=device)[:, :, None]
        self._rows = torch.tensor([rows for _, rows in plans], device=device).T[:, :, None]

    def period(self, layer: int) -> Tensor:
        """Tokens (b, 1) int64 between two borders of each sequence."""
        return self._periods[layer]

    def after(self, layer: int) -> Tensor:
        """Rows (b, 1) int64 that may stay at a border."""
        return self._rows[layer]


@lru_cache(maxsize=65536)
def _plan(
    sparsity: float, context: int, shares: tuple[float, ...], least: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The period of each layer, and its rows at a border."""
    held = torch.tensor(shares, dtype=torch.float64)
    window = window_of(sparsity, context)
    own = window * held / held.mean()
    # New tokens stay until the next border, wanted or not: half of a layer's rows at most.
    periods = tuple(_power_of_two(min(window / 4, rows / 2), LONGEST) for rows in own.tolist())
    every = torch.tensor(periods)
    earlier = torch.arange(context)
    border = earlier // every[:, None] * every[:, None]
    wanted = (1.0 - sparsity) * float(earlier.sum()) * len(shares)
    between = float((earlier - border).sum())
    # Rounded up or down layer by layer, so that few rows can still meet a share exactly.
    steps = (torch.arange(len(shares), dtype=torch.float64) * 0.6180339887498949 + 0.5) % 1.0
    # Rows that no border reaches count for nothing.
    most = border[:, -1].clamp_min(least) if context else torch.full_like(every, least)

    def rows(scale: float) -> Tensor:
        at_border = held * scale - (every - 1) / 2
        return torch.minimum((at_border + steps).floor().clamp_min(least).long(), most)

    def excess(scale: float) -> float:
        return float(torch.minimum(rows(scale)[:, None], border).sum()) + between - wanted

    low, high = 0.0, 2.0 * max(context, least) / max(min(shares), 1e-6) + 1.0
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (low, scale) if excess(scale) > 0 else (scale, high)
    nearest = min(low, high, key=lambda scale: abs(excess(scale)))
    return periods, tuple(rows(nearest).tolist())


def _power_of_two(number: float, most: int) -> int:
    """The largest one that is at most a number, in [1, most]; `most` is one itself."""
    period = most
    while period > 1 and period > number:
        period //= 2
    return period
