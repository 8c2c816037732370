"""From a sparsity to rows: how many a layer may hold, and after which tokens others must leave.

The sparsity of a text of n tokens is the share of its pairs j < k whose token j is gone when query
k looks. A layer meets it with the same number of rows at every length, since the first rows of a
cache are worth most; where rows are few they grow along the text (docs/how/method.md). Rows leave
at eviction steps alone, after every so many tokens of a sequence, and grow by one a token in
between; the share is met with that counted in. It is arithmetic of the host: no tensor is asked.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ctxprune.pruner.config import PERIOD, PruneConfig

# The longest eviction interval, in tokens.
LONGEST = 128
# Rows a layer at which a text is halfway between one of few rows and one of many.
FEW = 8
# Queries of a prompt that are judged together while it is read whole; the last ones observe it.
OBSERVERS = 64


def window_of(sparsity: float, context: int) -> float:
    """Width w of the local window that drops the share `sparsity` of the pairs j < k < context.

    A query sees min(k, w) earlier tokens: w n - w (w + 1) / 2 pairs of n (n - 1) / 2.
    """
    pairs = (1.0 - sparsity) * context * (context - 1) / 2.0
    half = context - 0.5
    return half - math.sqrt(max(half * half - 2.0 * pairs, 0.0))


def sparsity_of(window: float, context: int) -> float:
    """Share of the pairs j < k < context that a window of this width drops: inverse of the above.

    The window is at most the context.
    """
    window = min(window, context - 1.0)
    return 1.0 - window * (2 * context - window - 1) / (context * (context - 1))


def ceiling(config: PruneConfig, context: int) -> float:
    """The highest sparsity that the protected tokens leave possible at a context, in [0, 1)."""
    first, recent = config.protect_first, max(config.protect_recent, 1)
    # A query keeps the tokens of age below `recent`, and the first ones beyond those.
    kept = sum(min(k, recent - 1 + min(first, max(k - recent + 1, 0))) for k in range(context))
    return 1.0 - kept / (context * (context - 1) / 2.0)


def layer_windows(config: PruneConfig, sparsity: float, context: int) -> tuple[float, ...]:
    """Rows a layer, in proportion to each other, for a sparsity in (0, 1) at a context.

    It is the number of rows that decides how layers share them, so the level is looked up by the
    rows that it has at the tuned context; between two calibrated levels shares are linear. Of few
    rows, as in a short text, a part is divided evenly: every layer needs some for what is near.
    """
    rows = window_of(sparsity, context)
    level = sparsity_of(rows, config.context)
    known = list(config.levels)
    right = bisect_left(known, level)
    if right in (0, len(known)):
        shares = config.levels[known[min(right, len(known) - 1)]]
    else:
        low, high = known[right - 1], known[right]
        part = (level - low) / (high - low)
        pairs = zip(config.levels[low], config.levels[high], strict=True)
        shares = tuple((1 - part) * a + part * b for a, b in pairs)
    windows = [window_of(1.0 - share, config.context) for share in shares]
    even = fewness(rows)
    mean = sum(windows) / len(windows)
    return tuple(even * mean + (1.0 - even) * window for window in windows)


def fewness(rows: float) -> float:
    """How much of the law for few rows holds, in (0, 1]: 1 / (1 + (rows / 8)^2)."""
    return 1.0 / (1.0 + (rows / FEW) ** 2)


def interval_for(rows: float, window: float) -> int:
    """Tokens between two eviction steps of a layer that holds `rows` of a text, `window` the mean.

    New tokens stay until the next step, wanted or not: they are half of a layer's rows at most, and
    a quarter where the text has few, as far as 32; beyond that an eighth, in multiples of `PERIOD`.
    """
    few = max(window / 4, window * window / 360)
    short = _power_of_two(min(rows / 2, few), 32)
    return max(short, min(int(rows / 8) // PERIOD * PERIOD, LONGEST))


def cap_interval(max_rows: int) -> int:
    """Tokens between two eviction steps under a cap on rows, which leaves as many below it free.

    A sixteenth of the cap at most, and a divisor of `PERIOD`.
    """
    return _power_of_two(max_rows / 16, PERIOD)


@dataclass(frozen=True)
class Plan:
    """What the layers hold of one text.

    Attributes:
        intervals: tokens between two eviction steps, layer by layer.
        rows: that stay after 0, 1, 2 ... steps, layer by layer; empty: all of them.
    """

    intervals: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]


class Rows:
    """The rows that each sequence of a batch may hold, layer by layer.

    Args:
        plans: one a sequence, or one for any batch.
        max_rows: cap on the rows of a layer, at every moment.
        prompts: tokens of each sequence (or of any) that are read before the first row leaves;
            0: rows leave while it is read.
    """

    def __init__(
        self, plans: Sequence[Plan], max_rows: int | None = None, prompts: Sequence[int] = (0,)
    ) -> None:
        self._plans = plans
        self._cap = max_rows
        self._free = 0 if max_rows is None else cap_interval(max_rows)
        self._prompts = prompts

    @property
    def longest(self) -> int:
        """Tokens of a sequence between two eviction steps at most."""
        plans = enumerate(self._plans)
        return max(self.interval(layer, i) for i, p in plans for layer in range(len(p.intervals)))

    @property
    def room(self) -> int | None:
        """Rows that a cap leaves after a step, None without one."""
        return None if self._cap is None else self._cap - self._free

    @property
    def prompted(self) -> bool:
        """Whether some prompt is read before rows leave."""
        return any(self._prompts)

    def interval(self, layer: int, sequence: int) -> int:
        """Tokens between two eviction steps of a layer."""
        own = self._plan(sequence).intervals[layer]
        return min(own, self._free) if self._free else own

    def step(self, layer: int, sequence: int, seen: int) -> int:
        """After how many tokens of a sequence, of which `seen` are read, the next step comes."""
        prompt = self.prompt(sequence)
        if seen < prompt:
            return prompt - (prompt - seen - 1) // OBSERVERS * OBSERVERS
        interval = self.interval(layer, sequence)
        return (seen // interval + 1) * interval

    def after(self, layer: int, sequence: int, seen: int) -> int:
        """Rows that may stay at the step after `seen` tokens.

        Beyond the length that was announced they stay as many.
        """
        if seen < self.prompt(sequence):
            return seen
        plan = self._plan(sequence)
        rows = seen
        if plan.rows:
            of_layer = plan.rows[layer]
            rows = of_layer[min(seen // plan.intervals[layer], len(of_layer) - 1)]
        return rows if self.room is None else min(rows, self.room)

    def limit(self, layer: int, sequence: int) -> int | None:
        """Rows that a layer holds at most at any moment after the prompt; None: any number."""
        plan = self._plan(sequence)
        if self._cap is not None and not plan.rows:
            return self._cap
        if not plan.rows:
            return None
        most = max(plan.rows[layer]) + self.interval(layer, sequence)
        return most if self._cap is None else min(most, self._cap)

    def _plan(self, sequence: int) -> Plan:
        return self._plans[sequence if len(self._plans) > 1 else 0]

    def prompt(self, sequence: int) -> int:
        """Tokens of a sequence that are read before rows leave."""
        return self._prompts[sequence if len(self._prompts) > 1 else 0]


def unlimited(layers: int, interval: int = PERIOD) -> Plan:
    """All rows stay, unless there is a cap."""
    return Plan((interval,) * layers, ())


@lru_cache(maxsize=1024)
def plan(
    sparsity: float, context: int, shares: tuple[float, ...], least: int, longest: int = LONGEST
) -> Plan:
    """Rows in proportion to `shares` and to position^fewness, that keep 1 - sparsity of the pairs.

    Args:
        sparsity: share of the pairs j < k to drop, over all layers, in [0, 1).
        context: length of the text, for which the sparsity is met.
        shares: what the layers hold in proportion to each other.
        least: rows that are never refused. longest: tokens between two steps at most.
    """
    held = torch.tensor(shares, dtype=torch.float64)
    window = window_of(sparsity, context)
    own = window * held / held.mean()
    intervals = tuple(min(interval_for(rows, window), longest) for rows in own.tolist())
    steps = [torch.arange(0, context + 1, interval) for interval in intervals]
    counts = [len(of_layer) for of_layer in steps]
    layer = torch.arange(len(shares)).repeat_interleave(torch.tensor(counts))
    step, every = torch.cat(steps), torch.tensor(intervals)[layer]
    queries = torch.minimum(every, context - step)
    wanted = (1.0 - sparsity) * context * (context - 1) / 2 * len(shares)
    between = float((queries * (queries - 1) / 2).sum())
    grown = held[layer] * (step / max(context, 1)) ** fewness(window)
    # Rounded up or down layer by layer, so that few rows can still meet a share exactly.
    rounding = (torch.arange(len(shares), dtype=torch.float64) * 0.6180339887498949 + 0.5) % 1.0
    rest = rounding[layer] - (every - 1) / 2

    def rows(scale: float) -> torch.Tensor:
        return (grown * scale + rest).floor().clamp_min(least).long()

    def excess(scale: float) -> float:
        return float((torch.minimum(rows(scale), step) * queries).sum()) + between - wanted

    low, high = 0.0, 2.0 * max(context, least) / max(min(shares), 1e-6) + 1.0
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (low, scale) if excess(scale) > 0 else (scale, high)
    nearest = min(low, high, key=lambda scale: abs(excess(scale)))
    return Plan(intervals, tuple(tuple(part.tolist()) for part in rows(nearest).split(counts)))


def _power_of_two(number: float, most: int) -> int:
    """The largest one that is at most a number, in [1, most]; `most` is one itself."""
    period = most
    while period > 1 and period > number:
        period //= 2
    return period
