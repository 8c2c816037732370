"""How many rows a policy that goes by score may hold, and how often it is asked.

Such a policy holds as many rows at any length: of all ways to keep a share of the pairs j < k of a
text, an even one costs least, since the first rows of a cache are worth most. Not so where rows are
few: there they grow along the text, as a query far on has more to lose (docs/decisions.md).
Rows leave at borders, after every so many tokens of a sequence, and grow by one a token in between;
the share is met with that counted in. A layer of few rows has its borders close together, one of
many reads long blocks at full speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ctxprune.pruner.config import PERIOD
from ctxprune.pruner.gate import window_of

# The longest period of a budget: a block of as many queries is read at full speed.
LONGEST = 128
# Rows a layer at which a text is halfway between one of few rows and one of many.
FEW = 8


def fewness(rows: float) -> float:
    """How much of the law for few rows holds, in (0, 1]: 1 / (1 + (rows / 8)^2)."""
    return 1.0 / (1.0 + (rows / FEW) ** 2)


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
        self.periods = list(zip(*(plan.periods for plan in plans), strict=True))
        self._periods = torch.tensor(self.periods, device=device)[:, :, None]
        rows = [list(of_layer) for of_layer in zip(*(plan.rows for plan in plans), strict=True)]
        self._rows = [pad_sequence(of_layer, batch_first=True).to(device) for of_layer in rows]
        last = [[len(of_one) - 1 for of_one in of_layer] for of_layer in rows]
        self._last = torch.tensor(last, device=device)[:, :, None]

    def period(self, layer: int) -> Tensor:
        """Tokens (b, 1) int64 between two borders of each sequence."""
        return self._periods[layer]

    def after(self, layer: int, seen: Tensor) -> Tensor:
        """Rows (b, 1) int64 that may stay at the border after `seen` (b, 1) int64 tokens.

        Beyond the length that was announced they stay as many.
        """
        border = torch.minimum(seen // self._periods[layer], self._last[layer])
        rows = self._rows[layer]
        return rows.expand(len(border), -1).gather(1, border)


@dataclass(frozen=True)
class _Plan:
    """What layers hold of one text: their periods, and rows (borders,) int64 from token 0 on."""

    periods: tuple[int, ...]
    rows: tuple[Tensor, ...]


@lru_cache(maxsize=1024)
def _plan(sparsity: float, context: int, shares: tuple[float, ...], least: int) -> _Plan:
    """Rows in proportion to `shares` and to position^fewness, that keep 1 - sparsity of the pairs.

    Position is where the border is, and fewness that of the rows which the sparsity leaves.
    """
    held = torch.tensor(shares, dtype=torch.float64)
    window = window_of(sparsity, context)
    own = window * held / held.mean()
    # New tokens stay until the next border, wanted or not: half of a layer's rows at most.
    periods = tuple(_power_of_two(min(window / 4, rows / 2), LONGEST) for rows in own.tolist())
    borders = [torch.arange(0, context + 1, period) for period in periods]
    counts = [len(of_layer) for of_layer in borders]
    layer = torch.arange(len(shares)).repeat_interleave(torch.tensor(counts))
    border, every = torch.cat(borders), torch.tensor(periods)[layer]
    queries = torch.minimum(every, context - border)
    wanted = (1.0 - sparsity) * context * (context - 1) / 2 * len(shares)
    between = float((queries * (queries - 1) / 2).sum())
    grown = held[layer] * (border / max(context, 1)) ** fewness(window)
    # Rounded up or down layer by layer, so that few rows can still meet a share exactly.
    steps = (torch.arange(len(shares), dtype=torch.float64) * 0.6180339887498949 + 0.5) % 1.0
    rest = steps[layer] - (every - 1) / 2

    def rows(scale: float) -> Tensor:
        return (grown * scale + rest).floor().clamp_min(least).long()

    def excess(scale: float) -> float:
        return float((torch.minimum(rows(scale), border) * queries).sum()) + between - wanted

    low, high = 0.0, 2.0 * max(context, least) / max(min(shares), 1e-6) + 1.0
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (low, scale) if excess(scale) > 0 else (scale, high)
    nearest = min(low, high, key=lambda scale: abs(excess(scale)))
    return _Plan(periods, rows(nearest).split(counts))


def _power_of_two(number: float, most: int) -> int:
    """The largest one that is at most a number, in [1, most]; `most` is one itself."""
    period = most
    while period > 1 and period > number:
        period //= 2
    return period
