"""From a requested sparsity to the gate's threshold: the calibration table, read."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.gate import window_of

# Levels that every tuned model serves, beside the one asked for.
STANDARD = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Level:
    """A setting of the gates: log of the prior's window, and the calibrated shift."""

    log_window: float
    shift: float


def prior(sparsity: float, context: int) -> float:
    """log w of the window that has this sparsity at this context (see `gate.Gate`)."""
    return math.log(max(window_of(sparsity, context), 1.0))


def ceiling(config: PruneConfig, context: int) -> float:
    """The highest sparsity that the protected tokens leave possible at a context, in [0, 1)."""
    first, recent = config.protect_first, max(config.protect_recent, 1)
    # A query keeps the tokens of age below `recent`, and the first ones beyond those.
    kept = sum(min(k, recent - 1 + min(first, max(k - recent + 1, 0))) for k in range(context))
    return 1.0 - kept / (context * (context - 1) / 2.0)


def level_of(config: PruneConfig, sparsity: float) -> Level:
    """The setting for any sparsity in (0, 1): shifts are linear between calibrated levels."""
    known = list(config.levels)
    right = bisect_left(known, sparsity)
    if right == 0 or right == len(known):
        shift = config.levels[known[min(right, len(known) - 1)]]
    else:
        low, high = known[right - 1], known[right]
        share = (sparsity - low) / (high - low)
        shift = (1 - share) * config.levels[low] + share * config.levels[high]
    return Level(prior(sparsity, config.context), shift)
