"""How unlike the layers should be: shares raised to a power, picked by what is lost at inference.

One threshold for all layers ranks them by what they need, but makes them too much alike where rows
are few. So the shares of a level are raised to a power and scaled back to their sum, and the power
is the one with which the evicting engine stays nearest to the dense model on held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner import policies
from ctxprune.pruner.engine import handle_of
from ctxprune.pruner.objective import distillation_loss

POWERS = (1.0, 1.25, 1.5, 2.0)
# Held-out tokens that a power is picked on, read once for every level and power; and those a pass.
TOKENS = 4096
PASS = 1024


@torch.no_grad()
def divide(
    model: PreTrainedModel,
    windows: Tensor,
    shares: Mapping[float, tuple[float, ...]],
    on_phase: Callable[[str], None] | None = None,
) -> dict[float, tuple[float, ...]]:
    """Pick the division of the rows among the layers, level by level.

    Args:
        model: with a `Handle`. windows: (count, context) int64.
        shares: level -> share of the pairs j < k that each layer keeps.

    Returns:
        level -> shares of the same sum, the given ones to that power of `POWERS` whose divergence
        (`objective.distillation_loss`) from the dense model is least.
    """
    handle = handle_of(model)
    context = windows.shape[1]
    candidates = {
        (level, power): to_power(kept, power) for level, kept in shares.items() for power in POWERS
    }
    losses = dict.fromkeys(candidates, 0.0)
    count = min(max(1, TOKENS // context), len(windows))
    chosen = windows[torch.linspace(0, len(windows) - 1, count).long()]
    done = 0
    for batch in chosen.split(max(1, PASS // context)):
        if on_phase is not None:
            on_phase(f"dividing the rows among the layers, {done / count:.0%}")
        done += len(batch)
        ids = batch.to(model.device)
        with handle.trying(None):
            dense = model(ids, use_cache=False).logits
        for (level, power), kept in candidates.items():
            config = replace(handle.config, context=context, levels={level: kept})
            request = policies.Request(level, (context,), config, handle.gate_list)
            with handle.trying(policies.make("gate", request)):
                pruned = model(ids, use_cache=False).logits
            losses[level, power] += float(distillation_loss(pruned, dense)) * len(batch)
    best = {level: min(POWERS, key=lambda power: losses[level, power]) for level in shares}
    return {level: candidates[level, power] for level, power in best.items()}


def to_power(shares: Sequence[float], power: float) -> tuple[float, ...]:
    """Shares in [0, 1] to a power, scaled to the same sum with none above 1."""
    raised = torch.tensor(shares, dtype=torch.float64) ** power
    full = torch.zeros_like(raised, dtype=torch.bool)
    while True:
        scale = (sum(shares) - int(full.sum())) / raised[~full].sum()
        over = ~full & (raised * scale > 1.0)
        if not over.any():
            return tuple(torch.where(full, 1.0, raised * scale).tolist())
        full |= over
