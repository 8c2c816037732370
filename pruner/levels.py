"""From a requested sparsity to settings of the gates: what is trained at, and what layers hold."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from ctxprune.pruner.budget import fewness
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.gate import sparsity_of, window_of

# Levels that every tuned model is calibrated at, beside the one asked for.
STANDARD = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Level:
    """A threshold of the gates: log of the prior's window, and a shift of all scores."""

    log_window: float
    shift: float = 0.0


def prior(sparsity: float, context: int) -> float:
    """log w of the window that has this sparsity at this context (see `gate.Gate`)."""
    return math.log(max(window_of(sparsity, context), 1.0))


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
