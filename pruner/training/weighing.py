"""How much the attention that a row received should count beside its margin, when tuning is done.

Training needs a weight before there is a gate: it takes the one that the model was converted with.
How much a tuned gate leaves to the evidence differs from model to model, so it is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.training.divergence import divergences, held_out

# Of the weight in training.
MULTIPLES = (0.5, 1.0, 2.0)


def weigh(
    model: PreTrainedModel,
    windows: Tensor,
    config: PruneConfig,
    on_phase: Callable[[str], None] | None = None,
) -> float:
    """Pick the `attention_bonus` to evict by.

    Args:
        model: with a `Handle`. windows: (count, context) int64, held out.
        config: calibrated, with the level `tuned`.

    Returns:
        The one among `MULTIPLES` of the configuration's with which the engine, at the level that
        was tuned for, diverges least from the dense model; 0 stays 0.
    """
    if config.attention_bonus == 0.0:
        return 0.0
    bonuses = [multiple * config.attention_bonus for multiple in MULTIPLES]
    ways = [(config.tuned, replace(config, attention_bonus=bonus)) for bonus in bonuses]
    doing = "weighing the attention received"
    found = divergences(model, held_out(windows), ways, doing=doing, on_phase=on_phase)
    return bonuses[int(found.argmin())]
