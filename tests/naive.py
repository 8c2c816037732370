"""Eviction in plain loops: one layer, one sequence, no page, no batch, no blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctxprune.pruner.policies.random import draw

NEVER = torch.iinfo(torch.int64).max

Weights = dict[int, float]  # position -> attention, the mean over the heads


@dataclass
class Layer:
    """What the first layer computes of one sequence, whose input no eviction changes.

    Attributes:
        query: (h, n, d), key, value: (h_kv, n, d), rotated. scale: of the logits.
        margins: (n, n), [k, j] the least score that the gate gave token j up to query k.
        received: sum of the attention of each token; kept by the scores that need it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    margins: Tensor
    received: Weights = field(default_factory=dict)

    def look(self, k: int, held: list[int]) -> Weights:
        """The attention of query k to the tokens held."""
        key = self.key.repeat_interleave(len(self.query) // len(self.key), dim=0)
        logits = key[:, held] @ self.query[:, k, :, None] * self.query.shape[-1] ** -0.5
        mean = logits.softmax(dim=1).mean(dim=0)[:, 0]
        return dict(zip(held, mean.tolist(), strict=True))

    def add(self, since: list[Weights]) -> None:
        """Add up what the tokens received from the latest queries."""
        for weights in since:
            for j, weight in weights.items():
                self.received[j] = self.received.get(j, 0.0) + weight


# Of a layer, the tokens held, the attention of the queries since the last step and the number that
# may stay: what each token is worth. The last token held is the newest.
Score = Callable[[Layer, list[int], list[Weights], int], Weights]


def expires(
    layer: Layer, score: Score, steps: Collection[int], stay: Callable[[int], int]
) -> Tensor:
    """(n,) the position of the first query that does not see each token.

    Args:
        steps: after how many tokens rows leave. stay: how many do not, then.
    """
    length = len(layer.margins)
    found = torch.full((length,), NEVER)
    held: list[int] = []
    since: list[Weights] = []
    for k in range(length):
        held.append(k)
        since.append(layer.look(k, held))
        if k + 1 in steps:
            rows = min(stay(k + 1), len(held))
            worth = score(layer, held, since, rows)
            # The least leave, among equals the oldest.
            for j in sorted(held, key=lambda j: (worth[j], j))[: len(held) - rows]:
                found[j] = k + 1
            held = [j for j in held if found[j] == NEVER]
            since = []
    return found


def window(sinks: int) -> Score:
    """The newest, and the first."""
    return lambda layer, held, since, rows: {j: math.inf if j < sinks else j for j in held}


def strided(stride: int) -> Score:
    """Every so many tokens, and the newest."""
    return lambda layer, held, since, rows: {
        j: j + (held[-1] + 1 if j % stride == 0 else 0) for j in held
    }


def random(first: int, recent: int) -> Score:
    """By the number that each position of layer 0 draws."""

    def score(layer: Layer, held: list[int], since: list[Weights], rows: int) -> Weights:
        drawn = draw(torch.tensor(held), 0).tolist()
        return {
            j: math.inf if j < first or held[-1] - j < recent else number
            for j, number in zip(held, drawn, strict=True)
        }

    return score


def knorm(layer: Layer, held: list[int], since: list[Weights], rows: int) -> Weights:
    """Short keys."""
    return {j: -float(layer.key[:, j].norm(dim=-1).mean()) for j in held}


def tova(layer: Layer, held: list[int], since: list[Weights], rows: int) -> Weights:
    """The attention of the newest query."""
    return since[-1]


def h2o(layer: Layer, held: list[int], since: list[Weights], rows: int) -> Weights:
    """All attention received; the newest, half of those that stay, are protected."""
    layer.add(since)
    return {j: math.inf if held[-1] - j < rows // 2 else layer.received[j] for j in held}


def snapkv(layer: Layer, held: list[int], since: list[Weights], rows: int) -> Weights:
    """The attention of the observers, the most of five neighbours among the tokens held."""
    observers = min(len(since), rows // 2)
    votes = [sum(weights.get(j, 0.0) for weights in since) for j in held]
    pooled = [max(votes[max(i - 2, 0) : i + 3]) for i in range(len(held))]
    return {
        j: math.inf if held[-1] - j < observers else vote
        for j, vote in zip(held, pooled, strict=True)
    }


def gate(bonus: float, first: int) -> Score:
    """The margin, and the attention received times the norm of the value."""

    def score(layer: Layer, held: list[int], since: list[Weights], rows: int) -> Weights:
        layer.add(since)
        worth = {}
        for j in held:
            size = float(layer.value[:, j].norm(dim=-1).mean())
            margin = float(layer.margins[held[-1], j])
            worth[j] = margin + bonus * math.log(layer.received[j] * size)
        return {j: math.inf if j < first else number for j, number in worth.items()}

    return score
