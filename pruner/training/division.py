"""How unlike the layers should be: shares raised to a power, picked by what is lost at inference.

One threshold for all layers ranks them by what they need, but makes them too much alike. So the
shares of a level are raised to a power and scaled back to their sum, and the power is the one with
which the evicting engine stays nearest to the dense model on held-out text.

Running text seldom asks for what is far back, so it hardly tells a few layers that remember from
many that forget. So it only decides which powers may be taken, and among them the one is taken that
best recalls passages which the text repeats.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.training.divergence import divergences, held_out

POWERS = (1.0, 1.5, 2.0)
# The share of the least divergence on running text that recalling more may cost.
CONCESSION = 0.1
# Passages at the end of a window.
PASSAGES = 4


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
        level -> shares of the same sum: the given ones to one of `POWERS`. The divergence from the
        dense model (`objective.distillation_loss`) on running text is at most `CONCESSION` above
        the least, and that on passages which the text repeats (`recalled`) is least.
    """
    config, context = handle_of(model).config, windows.shape[1]
    divided = {
        (level, power): to_power(kept, power) for level, kept in shares.items() for power in POWERS
    }
    ways = [
        (level, replace(config, context=context, levels={level: kept}))
        for (level, _), kept in divided.items()
    ]
    first = _running(context)
    found = divergences(
        model,
        recalled(held_out(windows)),
        ways,
        parts=(slice(first), slice(first - 1, None)),
        doing="dividing the rows among the layers",
        on_phase=on_phase,
    )
    running, asked = (dict(zip(divided, part, strict=True)) for part in found.T.tolist())
    best = {
        level: pick(*({power: part[level, power] for power in POWERS} for part in (running, asked)))
        for level in shares
    }
    return {level: divided[level, power] for level, power in best.items()}


def pick(running: Mapping[float, float], asked: Mapping[float, float]) -> float:
    """The power with the least divergence on what is asked for, of those that may be taken.

    Those diverge on running text by at most `CONCESSION` of the least more than the least.
    """
    least = min(running.values())
    most = least + CONCESSION * abs(least)
    allowed = [power for power, divergence in running.items() if divergence <= most]
    return min(allowed, key=lambda power: asked[power])


def recalled(windows: Tensor) -> Tensor:
    """Windows (count, n) whose last tokens are passages from anywhere before, drawn by seed 0.

    They replace an eighth of each window.
    """
    draw = random.Random(0)
    end = _running(windows.shape[1])
    length = (windows.shape[1] - end) // PASSAGES
    rows = []
    for window in windows:
        starts = [draw.randrange(end - length + 1) for _ in range(PASSAGES)]
        rows.append(torch.cat([window[:end], *(window[at : at + length] for at in starts)]))
    return torch.stack(rows)


def _running(context: int) -> int:
    """Tokens of a window before its passages: seven eighths."""
    return context - PASSAGES * max(context // (8 * PASSAGES), 1)


def to_power(shares: Sequence[float], power: float) -> tuple[float, ...]:
    """Shares in [0, 1] to a power, scaled to the same sum with none above 1."""
    raised = torch.tensor(shares, dtype=torch.float64).clamp_min(1e-6) ** power
    full = torch.zeros_like(raised, dtype=torch.bool)
    while True:
        scale = (sum(shares) - int(full.sum())) / raised[~full].sum()
        over = ~full & (raised * scale > 1.0)
        if not over.any():
            return tuple(torch.where(full, 1.0, raised * scale).tolist())
        full |= over
