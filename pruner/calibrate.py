"""From a requested sparsity to the shift of the gates' threshold that realises it.

With hard decisions a token is gone once the least of its scores is below 0. The shift that drops
a given share is therefore a quantile of these margins; since dropping changes the hidden states
further up, the measurement is repeated at the shift found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner.engine import handle_of
from ctxprune.pruner.levels import Level, prior
from ctxprune.pruner.soft import SoftAttention

TOLERANCE = 0.002
ROUNDS = 6
# Pairs looked at for a quantile.
SAMPLE = 4_000_000


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    levels: Sequence[float],
    on_phase: Callable[[str], None] | None = None,
) -> dict[float, float]:
    """Find the shift for each level on held-out text.

    Args:
        model: with a `Handle`. windows: (count, context) int64. levels: each in (0, 1).

    Returns:
        level -> shift, realised within TOLERANCE where the margins allow it.
    """
    shifts: dict[float, float] = {}
    shift = 0.0
    for level in sorted(set(levels)):
        if on_phase is not None:
            on_phase(f"calibrating sparsity {level:g}")
        best = (float("inf"), shift)
        for _ in range(ROUNDS):
            realised, quantile = _measure(model, windows, level, shift)
            best = min(best, (abs(realised - level), shift))
            if best[0] <= TOLERANCE:
                break
            shift -= quantile
        shifts[level] = shift = best[1]
    return shifts


@torch.no_grad()
def _measure(
    model: PreTrainedModel, windows: Tensor, level: float, shift: float
) -> tuple[float, float]:
    """Hard sparsity at a shift, and the `level`-quantile of the margins there."""
    handle = handle_of(model)
    context = windows.shape[1]
    later, earlier = torch.tril_indices(context, context, offset=-1)
    stride = max(1, len(windows) * len(handle.gates) * len(later) // SAMPLE)
    margins, dropped, total = [], 0, 0
    for window in windows:
        soft = SoftAttention(
            Level(prior(level, context), shift),
            handle.config.protect_first,
            handle.config.protect_recent,
            hard=True,
        )
        soft.margins = {}
        with handle.training(soft):
            model(window[None].to(model.device), use_cache=False)
        for layer, margin in soft.margins.items():
            pairs = margin[0].cpu()[later, earlier]
            dropped += int((pairs <= 0).sum())
            total += len(pairs)
            margins.append(pairs[layer % stride :: stride])
    sample = torch.cat(margins)
    rank = min(max(round(level * len(sample)), 1), len(sample))
    return dropped / total, float(sample.kthvalue(rank).values)
