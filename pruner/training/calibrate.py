"""What a tuned model evicts by: the layer budgets of each level, and the weight of attention.

All of it is measured on held-out text, in three parts.

*Budgets.* The gates were trained against one threshold for all layers, so layers that need more
keep more. With hard decisions a token is gone once its score is below the threshold, and the one
that drops a given share of all pairs is a quantile of the scores. What is left in each layer then
is its keep ratio.

*Power.* One threshold ranks the layers by what they need, but makes them too much alike. So the
ratios are raised to a power and scaled back to their sum. Running text seldom asks for what is far
back, so it hardly tells a few layers that remember from many that forget: it only decides which
powers may be taken. Among them the one is taken that best recalls passages which the text repeats.

*Weight.* How much a tuned gate leaves to the attention that a row received differs from model to
model. Training needs a weight before there is a gate, and takes the one of the conversion; the
weight to evict by is picked afterwards, by what is lost on running text and of what is recalled.

Power and weight are picked at the level that was tuned for, and hold at all of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.engine.soft import Level, SoftAttention, prior
from ctxprune.pruner.finite import check_numbers
from ctxprune.pruner.rows import ceiling
from ctxprune.pruner.training.divergence import Reference, passes

# Held-out tokens, in two windows at least.
TOKENS = 4096
# Levels that every tuned model is calibrated at, beside the one asked for.
STANDARD = (0.5, 0.6, 0.7, 0.8, 0.9)
# Pairs of tokens looked at for a quantile, over all layers and windows.
SAMPLE = 4_000_000
POWERS = (1.0, 1.5, 2.0)
# The share of the least divergence on running text that recalling more may cost.
CONCESSION = 0.1
# Passages at the end of a window.
PASSAGES = 4
# Of running text every fourth prediction is compared.
STRIDE = 4
# Weights of the attention score that are tried, as multiples of the one in training.
MULTIPLES = (0.5, 1.0, 2.0)

OnPass = Callable[[int, int], None]


def calibrate(
    model: PreTrainedModel, windows: Tensor, sparsity: float, on_pass: OnPass | None = None
) -> PruneConfig:
    """The configuration of a model with levels to evict at, tuned for a sparsity in (0, 1).

    Args:
        model: with a `Handle`. windows: (count, context) int64, held out.
        on_pass: told how many passes over the model are done, and of how many.

    Raises:
        CtxpruneError: the model or its gates give no numbers.
    """
    handle = handle_of(model)
    context = windows.shape[1]
    config = replace(handle.config, tuned=sparsity, context=context)
    levels = _levels(model, sparsity, context)
    total, done = passes_of(model, windows, sparsity), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_pass is not None:
            on_pass(done, total)

    ratios = {level: keep_ratios(model, windows, level, tick) for level in levels}
    first = _running(context)
    places = torch.cat([torch.arange(0, first - 1, STRIDE), torch.arange(first - 1, context - 1)])
    reference = Reference(model, recalled(windows), places, tick)
    running = places < first - 1

    def lost(power: float, weight: float) -> tuple[float, float]:
        """Divergence on running text and on what is recalled."""
        tried = {sparsity: to_power(ratios[sparsity], power)}
        candidate = replace(config, levels=tried, attention_bonus=weight)
        found = reference.divergence(sparsity, candidate)
        return _typical(found[:, running]), _typical(found[:, ~running])

    weight = config.attention_bonus
    losses = {power: lost(power, weight) for power in POWERS}
    power = pick(losses)
    by_weight = {weight: losses[power]}
    for other in other_weights(weight):
        by_weight[other] = lost(power, other)
    return replace(
        config,
        levels={level: to_power(kept, power) for level, kept in ratios.items()},
        attention_bonus=min(by_weight, key=lambda weight: math.prod(by_weight[weight])),
    )


def _typical(divergences: Tensor) -> float:
    """The geometric mean over windows of what they have on the mean, of (windows, places).

    A few tokens at which everything is lost would decide by themselves in a plain mean.
    """
    return float(divergences.mean(dim=1).clamp_min(1e-9).log().mean().exp())


def passes_of(model: PreTrainedModel, windows: Tensor, sparsity: float) -> int:
    """Passes over the model that `calibrate` makes; arguments as there."""
    weights = other_weights(handle_of(model).config.attention_bonus)
    questions = 1 + len(POWERS) + len(weights)
    levels = _levels(model, sparsity, windows.shape[1])
    return len(levels) * (len(windows) + 1) + questions * passes(windows)


def _levels(model: PreTrainedModel, sparsity: float, context: int) -> list[float]:
    """`STANDARD` and the level asked for, without those that cannot be at the context."""
    handle = handle_of(model)
    least, most = 1.0 - handle.decoder.sight.kept(context), ceiling(handle.config, context)
    return [level for level in sorted({*STANDARD, sparsity}) if least < level < most]


def other_weights(weight: float) -> list[float]:
    """Weights of the attention score to try beside the one in training; none beside 0."""
    return [multiple * weight for multiple in MULTIPLES if multiple * weight != weight]


def keep_ratios(
    model: PreTrainedModel, windows: Tensor, level: float, on_pass: Callable[[], None]
) -> tuple[float, ...]:
    """Share of the pairs j < k that each layer keeps under one threshold; their mean is 1 - level.

    What is dropped changes the hidden states further up, and so the scores. Each window is read
    under the threshold that the windows before it gave, so the last ones under the right one; the
    first is read twice, since none comes before it.
    """
    layers = len(handle_of(model).gates)
    pairs = _sample(windows.shape[1], SAMPLE // (len(windows) * layers))
    scores = _scores(model, windows[0], level, 0.0, pairs)
    on_pass()
    threshold = _quantile(scores, level)
    read: list[Tensor] = []
    for window in windows:
        read.append(_scores(model, window, level, threshold, pairs))
        on_pass()
        threshold = _quantile(torch.cat(read, dim=1), level)
    kept = (torch.cat(read, dim=1) > threshold).double().mean(dim=1)
    return tuple(kept.tolist())


@torch.no_grad()
def _scores(
    model: PreTrainedModel,
    window: Tensor,
    level: float,
    threshold: float,
    pairs: tuple[Tensor, Tensor],
) -> Tensor:
    """(layers, pairs) scores of a window whose tokens leave below a threshold."""
    handle = handle_of(model)
    soft = SoftAttention(Level(prior(level, len(window)), -threshold), handle.config, hard=True)
    soft.scores = {}
    with handle.running(soft):
        model(window[None].to(input_device(model)), use_cache=False, logits_to_keep=1)
    some = [soft.scores[layer].cpu()[(0, *pairs)] for layer in sorted(soft.scores)]
    scores = torch.stack(some).add_(threshold)
    check_numbers(scores, "the scores of the gates on held-out text")
    return scores


def _sample(context: int, count: int) -> tuple[Tensor, Tensor]:
    """Positions k and j of some pairs j < k, all of them or `count` drawn by seed 0."""
    later, earlier = torch.tril_indices(context, context, offset=-1)
    if count < len(later):
        # Not every so many: that would favour some ages, as the pairs lie row by row.
        drawn = torch.randint(len(later), (count,), generator=torch.Generator().manual_seed(0))
        later, earlier = later[drawn], earlier[drawn]
    return later, earlier


def _quantile(scores: Tensor, level: float) -> float:
    """The score below which the share `level` of all lies."""
    rank = min(max(round(level * scores.numel()), 1), scores.numel())
    return float(scores.flatten().kthvalue(rank).values)


def pick(losses: Mapping[float, tuple[float, float]]) -> float:
    """The power that recalls best, of those that may be taken.

    Args:
        losses: power -> divergence on running text, and on what is recalled.

    A power may be taken if its divergence on running text is at most `CONCESSION` of the least
    above the least.
    """
    least = min(running for running, _ in losses.values())
    most = least + CONCESSION * abs(least)
    allowed = [power for power, (running, _) in losses.items() if running <= most]
    return min(allowed, key=lambda power: losses[power][1])


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


def to_power(ratios: Sequence[float], power: float) -> tuple[float, ...]:
    """Keep ratios in [0, 1] to a power, scaled to the same sum with none above 1."""
    raised = torch.tensor(ratios, dtype=torch.float64).clamp_min(1e-6) ** power
    full = torch.zeros_like(raised, dtype=torch.bool)
    while True:
        scale = (sum(ratios) - int(full.sum())) / raised[~full].sum()
        over = ~full & (raised * scale > 1.0)
        if not over.any():
            return tuple(torch.where(full, 1.0, raised * scale).tolist())
        full |= over
