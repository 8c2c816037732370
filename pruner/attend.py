"""The evicting attention: one function for prefill, decode and scoring. Cost: tokens x kept.

`soft_attend` is its twin for training, with all pairs at once and decisions that are soft.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxprune.pruner.gate import Gate, free_pairs, log_survival, margin
from ctxprune.pruner.levels import Level
from ctxprune.pruner.policies import Block, Policy
from ctxprune.pruner.table import Table

# Queries a block. A larger one holds more rows at its end, a smaller one makes more small steps.
BLOCK = 64


class Tally:
    """Counts, over everything attended to, how much of the context was gone.

    Pairs (j < k) are counted over layers and sequences.
    """

    def __init__(self) -> None:
        self.kept: Tensor | int = 0
        self.pairs: Tensor | int = 0


def attend(
    table: Table,
    policy: Policy,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    position: Tensor,
    *,
    scale: float,
    tally: Tally,
    expires: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Attend to the rows that the policy keeps, and evict the others.

    Args:
        query: (b, h, n, d); key, value: (b, h_kv, n, d), rotated already, of n new tokens.
        hidden: (b, n, hidden_size), the input of the attention module.
        position: (b, n) int64 from the first real token of each sequence, -1 for padding.
        tally: counts pairs.
        expires: optional (b, total) int64, indexed by position; entry j is set to the position of
            the query that dropped token j.
        block: queries a step; the result does not depend on it.

    Returns:
        (b, h, n, d) of query's dtype; arbitrary but finite at padding.
    """
    notes = policy.annotate(layer, hidden)
    outputs = []
    for start in range(0, query.shape[2], block):
        part = slice(start, start + block)
        now = Block(position[:, part], {name: note[:, part] for name, note in notes.items()})
        columns = {name: now.notes[name].unsqueeze(1) for name in policy.columns}
        table.append(now.position, key=key[:, :, part], value=value[:, :, part], **columns)
        alive, visible = _decide(table, policy, layer, now)
        tally.kept = tally.kept + visible.sum() - (now.position >= 0).sum()
        tally.pairs = tally.pairs + now.position.clamp_min(0).sum()
        outputs.append(
            _grouped_sdpa(
                query[:, :, part], table.columns["key"], table.columns["value"], visible, scale
            )
        )
        if expires is not None:
            _note_expiry(expires, table, now, alive)
        table.evict(alive[:, -1])
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _decide(table: Table, policy: Policy, layer: int, now: Block) -> tuple[Tensor, Tensor]:
    """`alive` (b, q, r): not dropped by any query up to k. `visible`: alive, held and not later."""
    assert table.position is not None
    row, query = table.position[:, None, :], now.position[:, :, None]
    earlier = (row >= 0) & (row < query)
    alive = policy.keep(layer, table, now) | ~earlier
    if alive.shape[1] > 1:
        alive = alive.to(torch.uint8).cummin(dim=1).values.bool()
    return alive, alive & (row >= 0) & (row <= query)


def _grouped_sdpa(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Attention of (b, h, q, d) to (b, h_kv, r, d) under a mask (b, q, r).

    The query heads of a group are folded into the query axis, so keys and values are not repeated.
    """
    batch, heads, queries, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # A padded query sees nothing; let it see everything rather than divide by zero.
    mask = visible | ~visible.any(dim=-1, keepdim=True)
    folded = query.reshape(batch, kv_heads, groups * queries, width)
    mask = mask[:, None].expand(-1, groups, -1, -1).reshape(batch, 1, groups * queries, -1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, queries, value.shape[-1])


def _note_expiry(expires: Tensor, table: Table, now: Block, alive: Tensor) -> None:
    assert table.position is not None
    dropped = ~alive[:, -1]
    # The first query that drops: alive is monotone, so the count of True is its index.
    first = alive.sum(dim=1).clamp_max(alive.shape[1] - 1)
    when = now.position.gather(1, first)
    sequence, slot = dropped.nonzero(as_tuple=True)
    expires[sequence, table.position[sequence, slot]] = when[sequence, slot]


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
