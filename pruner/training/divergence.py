"""How far the evicting engine is from the dense model, where several ways to evict are tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner import policies
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.data import spread
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.engine.modes import Evict, Off
from ctxprune.pruner.training.objective import distillation_loss

# Held-out tokens that each way is tried on, and those a pass.
TOKENS = 4096
PASS = 1024


def held_out(windows: Tensor) -> Tensor:
    """Of windows (count, n), about `TOKENS` tokens from all over them; at least one window."""
    return spread(windows, max(1, TOKENS // windows.shape[1]))


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    windows: Tensor,
    ways: Sequence[tuple[float, PruneConfig]],
    *,
    parts: Sequence[slice] = (slice(None),),
    doing: str,
    on_phase: Callable[[str], None] | None = None,
) -> Tensor:
    """Divergence from the dense model (`objective.distillation_loss`) of each way to evict.

    Args:
        model: with a `Handle`. windows: (count, n) int64.
        ways: level and configuration of the gate policy.
        parts: of each window, measured apart.
        on_phase: told now and then how much of `doing` is done.

    Returns:
        (ways, parts), float64: nats a token, the mean over the windows.
    """
    handle = handle_of(model)
    context = windows.shape[1]
    found = torch.zeros(len(ways), len(parts), dtype=torch.float64)
    done = 0
    for batch in windows.split(max(1, PASS // context)):
        if on_phase is not None:
            on_phase(f"{doing}, {done / len(windows):.0%}")
        done += len(batch)
        ids = batch.to(input_device(model))
        with handle.running(Off()):
            dense = model(ids, use_cache=False).logits
        for way, (level, config) in enumerate(ways):
            request = policies.Request(level, (context,), config, handle.gate_list)
            with handle.running(Evict(policies.make("gate", request))):
                pruned = model(ids, use_cache=False).logits
            for index, part in enumerate(parts):
                divergence = float(distillation_loss(pruned[:, part], dense[:, part]))
                found[way, index] += divergence * len(batch) / len(windows)
    return found
