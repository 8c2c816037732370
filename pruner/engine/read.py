"""Reading many tokens at once: blocks of queries, and the eviction steps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine.attend import attention, in_sight, span
from ctxprune.pruner.engine.evict import note, settle, staying
from ctxprune.pruner.engine.page import New, Page, Queries
from ctxprune.pruner.engine.weights import Logits, causal, earlier
from ctxprune.pruner.policies import Policy


def read_block(
    page: Page,
    new: New,
    query: Tensor,
    logits: Logits,
    sight: Sight | None,
    counts: list[int],
    first: list[int],
) -> Tensor:
    """Attend with a block of new tokens, each to the rows held and to those before it in the block.

    Args:
        new: the tokens; query: (b, h, n, d). logits: how weights come of it.
        sight: what queries may see, by the positions of the page; None: all.
        counts: tokens of each sequence in the block.
        first: column of each sequence's first one; they are consecutive.

    Returns:
        (b, h, n, d), finite where a sequence has no token.
    """
    length = query.shape[2]
    page.grow(max(used + count for used, count in zip(page.used, counts, strict=True)))
    if set(counts) == {length} and len(set(page.used)) == len(set(page.settled)) == 1:
        used = page.used[0]
        with span("eviction"):
            page.write(new, used, used - page.settled[0])
        with span("attention"):
            stop = used + length
            key, value = page.rows(stop)
            mask = None if length == 1 else causal(query, key, used)
            if sight is not None:
                mask = earlier(query, key, used) & in_sight(page, new, sight, stop)
            return attention(query, key, value, mask, logits)
    used, settled, count, start = torch.tensor(
        [page.used, page.settled, counts, first], device=query.device
    )[:, :, None]
    rank = torch.arange(length, device=query.device) - start
    real = (rank >= 0) & (rank < count)
    slot = torch.where(real, used + rank, page.slots)
    waiting = 0 if page.waiting is None else page.waiting
    with span("eviction"):
        page.write(new, slot, torch.where(real, used - settled + rank, waiting))
    with span("attention"):
        stop = max(u + c for u, c in zip(page.used, counts, strict=True))
        # A query that is none sees the first slot rather than divide by zero.
        limit = torch.where(real, slot, 0)
        visible = torch.arange(max(stop, 1), device=query.device) <= limit[:, :, None]
        if sight is not None:
            visible &= in_sight(page, new, sight, max(stop, 1)) | ~real[:, :, None]
        key, value = page.rows(max(stop, 1))
        return attention(query, key, value, visible, logits)


def read_steps(
    page: Page,
    policy: Policy,
    layer: int,
    new: New,
    query: Tensor,
    logits: Logits,
    steps: Sequence[tuple[int, int]],
    seen: Sequence[int],
    expires: Tensor | None,
) -> Tensor:
    """Attend with consecutive blocks of new tokens, each of which ends at an eviction step.

    It is `read_block` and `evict` in turn, for sequences that hold equally many rows, have no
    waiting queries and see all that is held, at less cost: rows that leave are hidden, and those
    that stay close ranks after the last step alone; and what the attention and the policy both need
    is computed once. Beside the keys and values of all tokens, which a layer has while it reads
    them, a copy of the rows held lives for so long.

    Args:
        new, query, logits: as in `read_block`; layer, expires: as in `evict`.
        steps: tokens of these that are read when the step comes, and rows that stay after it.
        seen: tokens of each sequence that were read before.

    Returns:
        (b, h, n, d).
    """
    used, length = page.used[0], query.shape[2]
    everyone = range(len(page.used))
    fits = used + length <= page.slots
    with span("eviction"):
        # No query waits: they are here until the last step.
        if fits:
            page.write(replace(new, query=None, features=None), used, 0)
        wide = page if fits else page.wider(new)
    with span("policy"):
        held = wide.held(None, used + length)
        position = settle(held, policy, used, used + length, [n - used for n in seen])
        queries = Queries(position, used, new.features, 0, everyone, held, new.query, logits)
        policy.remember(layer, held, queries)
    # Where no weights are asked for, one product serves all steps.
    sees = None if policy.watches else position[:, :, None] >= held.position[:, None]
    outputs, start, gone = [], 0, 0
    for stop, stay in steps:
        rows = used + stop
        front = held.front(rows)
        hidden = front.position < 0 if gone else None
        asked = queries.at_step(start, stop, front, stay, hidden)
        if sees is None:
            with span("attention"):
                outputs.append(asked.attended(query[:, :, start:stop]))
        with span("policy"):
            score = policy.score(layer, front, asked)
            if rows - stay > gone:
                if hidden is not None:
                    score = score.masked_fill(hidden, -torch.inf)
                order = score.argsort(dim=1, stable=True)
                if expires is not None:
                    read = [n + stop for n in seen]
                    note(expires, front.position, everyone, read, order, stay)
                gone = rows - stay
                front.position.scatter_(1, order[:, :gone], -1)
                if sees is not None:
                    sees[:, stop:] &= (held.position >= 0)[:, None]
        start = stop
    if sees is not None:
        with span("attention"):
            outputs.append(attention(query, held.key, held.value, sees, logits))
    stay = used + length - gone
    if gone or not fits:
        page.grow(stay)
        with span("policy"):
            left = (held.position < 0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            page.keep(None, staying(left, stay, stay), wide)
    page.used = [stay] * len(page.used)
    page.settled = list(page.used)
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
