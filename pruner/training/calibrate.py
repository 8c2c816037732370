"""How many rows each layer deserves at a level: measured on held-out text.

The gates were trained against one threshold for all layers, so layers that need more keep more.
With hard decisions a token is gone once its score, margin and bonus, is below that threshold: the
one that drops a given share of all pairs is a quantile of these scores. Since dropping changes the
hidden states further up, the measurement is repeated at the threshold found. What is left in each
layer is its share; inference gives it as many rows, the best by the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.engine.soft import Level, SoftAttention, prior

# Levels that every tuned model is calibrated at, beside the one asked for.
STANDARD = (0.5, 0.6, 0.7, 0.8, 0.9)
TOLERANCE = 0.005
ROUNDS = 5
# Pairs looked at for a quantile.
SAMPLE = 4_000_000


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    levels: Sequence[float],
    on_phase: Callable[[str], None] | None = None,
) -> dict[float, tuple[float, ...]]:
    """Find what each layer keeps at each level.

    Args:
        model: with a `Handle`. windows: (count, context) int64. levels: each in (0, 1).

    Returns:
        level -> share of the pairs j < k that each layer keeps; their mean is 1 - level, within
        TOLERANCE where the scores allow it.
    """
    shares: dict[float, tuple[float, ...]] = {}
    shift = 0.0
    for level in sorted(set(levels)):
        if on_phase is not None:
            on_phase(f"calibrating sparsity {level:g}")
        best = float("inf")
        for _ in range(ROUNDS):
            kept, quantile = _measure(model, windows, level, shift)
            missed = abs(1.0 - sum(kept) / len(kept) - level)
            if missed < best:
                best, shares[level], found = missed, kept, shift
            if best <= TOLERANCE:
                break
            shift -= quantile
        shift = found
    return shares


@torch.no_grad()
def _measure(
    model: PreTrainedModel, windows: Tensor, level: float, shift: float
) -> tuple[tuple[float, ...], float]:
    """Share of the pairs kept in each layer, and the `level`-quantile of the scores there."""
    handle = handle_of(model)
    context = windows.shape[1]
    later, earlier = torch.tril_indices(context, context, offset=-1)
    stride = max(1, len(windows) * len(handle.gates) * len(later) // SAMPLE)
    scores = []
    kept = torch.zeros(len(handle.gates), dtype=torch.float64)
    for window in windows:
        soft = SoftAttention(Level(prior(level, context), shift), handle.config, hard=True)
        soft.scores = {}
        with handle.running(soft):
            model(window[None].to(input_device(model)), use_cache=False, logits_to_keep=1)
        for layer, score in soft.scores.items():
            pairs = score[0].cpu()[later, earlier]
            kept[layer] += float((pairs > 0).double().mean()) / len(windows)
            scores.append(pairs[layer % stride :: stride])
    sample = torch.cat(scores)
    rank = min(max(round(level * len(sample)), 1), len(sample))
    return tuple(kept.tolist()), float(sample.kthvalue(rank).values)
