"""Attention as training sees it: all pairs at once, with decisions that are soft.

The gate's own code decides here as it does in `attend`; with hard decisions both give the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxprune.pruner.gate import Gate, free_pairs, log_survival, margin
from ctxprune.pruner.levels import Level


@dataclass
class SoftAttention:
    """How the training path decides, and what it saw, layer by layer.

    Attributes:
        level: the gates' setting.
        sharpness, alpha: see `TuneConfig`; ignored where hard.
        hard: decide as inference does.
        protect_first, protect_recent: see `PruneConfig`.
        kept: share of the pairs j < k that survive, one differentiable scalar a layer.
        hard_kept: the same with hard decisions. live: share of the pairs whose decision still
            passes a gradient (0 < p < 1, beyond rounding).
        margins: with `hard`, what `gate.margin` gave, (b, n, n) a layer, if asked for.
    """

    level: Level
    protect_first: int
    protect_recent: int
    sharpness: float = 1.0
    alpha: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.hard_kept: dict[int, Tensor] = {}
        self.live: dict[int, Tensor] = {}
        self.margins: dict[int, Tensor] | None = None


def soft_attend(
    soft: SoftAttention,
    gate: Gate,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    *,
    scale: float,
) -> Tensor:
    """softmax(Q K^T scale + log I) V for full windows without padding (arXiv 2305.15805, eq. 5).

    Shapes as in `attend`. With `soft.hard`, log I is 0 or -inf, as at inference.
    """
    length = hidden.shape[1]
    position = torch.arange(length, device=hidden.device)[None]
    free = free_pairs(position, position, soft.protect_first, soft.protect_recent)
    interaction = gate.interact(hidden)
    scores = gate.scores(*interaction, position, position, soft.level.log_window, soft.level.shift)
    causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    pairs = hidden.shape[0] * length * (length - 1) / 2
    least = margin(scores, free)
    with torch.no_grad():
        alive = (least > 0) & causal
        soft.hard_kept[layer] = (alive.sum() - hidden.shape[0] * length) / pairs
        if soft.margins is not None:
            soft.margins[layer] = least.detach()
    if soft.hard:
        bias = torch.zeros_like(scores).masked_fill(~alive, -torch.inf)
    else:
        log_kept = log_survival(least * soft.sharpness, soft.alpha)
        survived = log_kept.exp().masked_fill(~causal, 0.0)
        soft.kept[layer] = (survived.sum() - hidden.shape[0] * length) / pairs
        with torch.no_grad():
            learning = (survived > 1e-3) & (survived < 1 - 1e-3)
            soft.live[layer] = learning.sum() / pairs
        bias = log_kept.clamp_min(-1e4).masked_fill(~causal, -torch.inf)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias[:, None].to(query.dtype),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
