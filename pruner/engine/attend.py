"""The evicting attention: one function for prefill, decode and scoring. Cost: tokens x kept.

Its twin for training is `soft.soft_attend`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.nn import functional as F

from ctxprune.pruner.budget import cap_period
from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.policies import Block, Policy

# Queries a block. A larger one holds more rows at its end, a smaller one makes more small steps
# (docs/performance.md).
BLOCK = 128
# Start and stop of a block of queries, and whether it ends at a border: its last token is, for some
# sequence, one after which rows leave by score.
Cut = tuple[int, int, bool]


class Tally:
    """Counts over everything attended to.

    Attributes:
        kept, pairs: the pairs j < k that were looked at, and that there are, over layers and
            sequences.
        capped, borders: how often the cap on rows made some leave, and how often it was asked,
            over layers and sequences.
    """

    def __init__(self) -> None:
        self.kept: Tensor | int = 0
        self.pairs: Tensor | int = 0
        self.capped: Tensor | int = 0
        self.borders: Tensor | int = 0


@dataclass(frozen=True)
class Reading:
    """The tokens of one forward pass.

    Attributes:
        position: (b, n) int64 from the first real token of each sequence, -1 for padding.
        seen: at least the number of tokens that any sequence has seen after this pass.
        padded: some of them are -1.
        blocks: layer by layer, where the queries are cut.
        max_rows: cap on the rows of a sequence.
        tally: counts, if anybody wants to know.
    """

    position: Tensor
    seen: int
    padded: bool
    blocks: tuple[tuple[Cut, ...], ...]
    max_rows: int | None = None
    tally: Tally | None = None


@torch.no_grad()
def attend(
    table: Table,
    policy: Policy,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    reading: Reading,
    *,
    scale: float,
    waiting: list[Block],
    expires: Tensor | None = None,
) -> Tensor:
    """Attend to the rows that the policy keeps, and evict the others; no gradient passes.

    Args:
        query: (b, h, n, d); key, value: (b, h_kv, n, d), rotated already, of n new tokens.
        hidden: (b, n, hidden_size), the input of the attention module.
        reading: what these tokens are; the result does not depend on how it cuts them into blocks.
        waiting: blocks of this layer that the policy has not digested; kept by the caller.
        expires: optional (b, total) int64, indexed by position; entry j is set to the position of
            the first query that does not see token j any more.

    Returns:
        (b, h, n, d) of query's dtype; arbitrary but finite at padding.
    """
    with _span("gate"):
        notes = policy.annotate(layer, hidden)
    outputs = []
    blocks = reading.blocks[layer]
    for index, (start, stop, border) in enumerate(blocks):
        part = slice(start, stop)
        now = Block(
            reading.position[:, part],
            {name: note[:, part] for name, note in notes.items()},
            reading.seen,
            reading.padded,
        )
        with _span("eviction"):
            columns = {name: now.notes[name].unsqueeze(1) for name in policy.columns}
            table.append(now.position, key=key[:, :, part], value=value[:, :, part], **columns)
        with _span("policy"):
            alive, visible = _decide(table, policy, layer, now)
        if reading.tally is not None:
            _count(reading.tally, now, visible)
        with _span("attention"):
            outputs.append(_attention(table, policy, layer, query[:, :, part], now, visible, scale))
        if policy.digests:
            waiting.append(now)
            if border:
                with _span("policy"):
                    policy.digest(layer, table, _joined(waiting))
                    waiting.clear()
        with _span("eviction"):
            stays = None if alive is None else alive[:, -1]
            if border:
                stays = _limit(table, policy, layer, now, stays, reading)
            if stays is not None:
                if expires is not None:
                    _note_expiry(expires, table, now, alive, stays)
                following = blocks[index + 1 : index + 2]
                more = following[0][1] - stop if following else 0
                table.evict(stays, more=more)
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _span(name: str) -> AbstractContextManager[object]:
    """A range in torch's profiler; entering one costs microseconds even if none is running."""
    if profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"ctxprune.{name}")
    return nullcontext()


def _joined(blocks: list[Block]) -> Block:
    """Consecutive blocks as one."""
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        torch.cat([block.position for block in blocks], dim=1),
        {
            name: torch.cat([block.notes[name] for block in blocks], dim=1)
            for name in blocks[0].notes
        },
        blocks[-1].seen,
        any(block.padded for block in blocks),
    )


def _decide(table: Table, policy: Policy, layer: int, now: Block) -> tuple[Tensor | None, Tensor]:
    """`alive` (b, q, r): no query up to k dropped it; None: all. `visible`: and held, not later."""
    row, query = table.held[:, None, :], now.position[:, :, None]
    keep = policy.keep(layer, table, now)
    visible = row >= 0
    if now.position.shape[1] == 1 and not now.padded:
        return keep, visible if keep is None else keep & visible
    visible = visible & (row <= query)
    if keep is None:
        return None, visible
    alive = _running_and(keep | (row >= query))
    return alive, alive & visible


def _running_and(decisions: Tensor) -> Tensor:
    """(b, q, r) bool: True while all of the queries so far said True."""
    width = 1
    # Doubling the reach takes log q passes over contiguous memory; cummin takes q strided ones.
    while width < decisions.shape[1]:
        decisions = torch.cat(
            [decisions[:, :width], decisions[:, width:] & decisions[:, :-width]], dim=1
        )
        width *= 2
    return decisions


def _count(tally: Tally, now: Block, visible: Tensor) -> None:
    """A query sees itself, and the pairs of query k are the k tokens before it."""
    real = now.position >= 0
    tally.kept = tally.kept + (visible & real[:, :, None]).sum() - real.sum()
    tally.pairs = tally.pairs + now.position.clamp_min(0).sum()


def _attention(
    table: Table,
    policy: Policy,
    layer: int,
    query: Tensor,
    now: Block,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """Attention of (b, h, q, d) to the visible rows of the table."""
    if now.padded:
        # A padded query sees nothing; let it see everything rather than divide by zero.
        visible = visible | ~visible.any(dim=-1, keepdim=True)
    key, value = table.column("key"), table.column("value")
    if not policy.needs_weights:
        return grouped_sdpa(query, key, value, visible, scale)
    out, weights = _weighted(query, key, value, visible, scale)
    if now.padded:
        weights *= (now.position >= 0)[:, :, None]
    policy.observe(layer, table, now, weights)
    return out


def grouped_sdpa(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of (b, h, q, d) to (b, h_kv, r, d) under a mask (b, q, r); None: all to all.

    The query heads of a group are folded into the query axis, so keys and values are not repeated.
    """
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * queries, width)
    mask = None if visible is None else visible[:, None]
    if mask is not None and queries > 1:
        mask = mask.expand(-1, groups, -1, -1).reshape(batch, 1, groups * queries, -1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, queries, value.shape[-1])


def _weighted(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same, written out, with the weights (b, q, r), float32 or wider, mean over the heads."""
    batch, heads, queries, _ = query.shape
    key_heads, rows = key.shape[1:3]
    # One key head after another in the same memory: so a block's logits stay in a CPU's cache, and
    # no fresh pages are touched. Those of a single query are few, and a GPU wants them all at once.
    together = key_heads if queries == 1 or query.is_cuda else 1
    folded = query.unflatten(1, (key_heads, -1)).flatten(2, 3)
    bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    logits = query.new_empty((batch * together, folded.shape[2], rows))
    weights = torch.empty_like(logits, dtype=torch.promote_types(query.dtype, torch.float32))
    out = query.new_empty((*folded.shape[:3], value.shape[3]))
    total = torch.zeros_like(visible, dtype=weights.dtype)
    for first in range(0, key_heads, together):
        part = slice(first, first + together)
        q, k, v = (tensor[:, part].flatten(0, 1) for tensor in (folded, key, value))
        logits.view(batch, -1, queries, rows).copy_(bias[:, None])
        logits.baddbmm_(q, k.transpose(1, 2), alpha=scale)
        torch.softmax(logits, dim=-1, dtype=weights.dtype, out=weights)
        out[:, part] = (weights.to(v.dtype) @ v).unflatten(0, (batch, together))
        total += weights.view(batch, -1, queries, rows).sum(dim=1)
    return out.view(batch, heads, queries, -1), total.div_(heads)


def _limit(
    table: Table, policy: Policy, layer: int, now: Block, stays: Tensor | None, reading: Reading
) -> Tensor:
    """`stays` (b, r), None: all, without the rows beyond the policy's budget and the cap.

    Each is enforced for the sequences whose newest token is at a border of its own. The cap leaves
    room for the tokens until the next time, so that it holds at every moment.
    """
    newest = now.position.amax(dim=1, keepdim=True)
    seen = newest + 1
    held = table.held >= 0
    if stays is not None:
        held = held & stays
    rows = held.sum(dim=1, keepdim=True)
    limit = rows
    if policy.budget is not None:
        asked = (newest >= 0) & (seen % policy.budget.period(layer) == 0)
        limit = torch.where(asked, torch.minimum(rows, policy.budget.after(layer, seen)), rows)
    if reading.max_rows is not None:
        period = cap_period(reading.max_rows)
        room = reading.max_rows - period
        asked = (newest >= 0) & (seen % period == 0)
        if reading.tally is not None:
            reading.tally.capped = reading.tally.capped + (asked & (limit > room)).sum()
            reading.tally.borders = reading.tally.borders + asked.sum()
        limit = torch.where(asked, limit.clamp_max(room), limit)
    scores = policy.score(layer, table, newest, limit)
    # By score, and the newest first among equals; what is not held comes last.
    order = table.held.masked_fill(~held, -1).argsort(dim=1, descending=True)
    scores = scores.masked_fill(~held, -torch.inf).gather(1, order)
    order = order.gather(1, scores.argsort(dim=1, descending=True, stable=True))
    place = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(held).scatter_(1, order, place < limit)


def _note_expiry(
    expires: Tensor, table: Table, now: Block, alive: Tensor | None, stays: Tensor
) -> None:
    """Note the first query that drops each row; a row that leaves by score is gone for the next."""
    dropped = ~stays & (table.held >= 0)
    after = now.position.amax(dim=1, keepdim=True) + 1
    when = after.expand_as(dropped)
    if alive is not None:
        # alive is monotone, so the count of True is the index of that query.
        when = torch.cat([now.position, after], dim=1).gather(1, alive.sum(dim=1))
    sequence, slot = dropped.nonzero(as_tuple=True)
    expires[sequence, table.held[sequence, slot]] = when[sequence, slot]
