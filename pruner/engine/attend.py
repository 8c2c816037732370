"""The evicting attention of one new token: write its row, attend to what is held.

No policy is asked: rows leave at eviction steps alone (`evict.py`). Many tokens at once are read in
blocks (`read.py`); the twin of both for training is `soft.soft_attend`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.nn import functional as F

from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine.page import New, Page
from ctxprune.pruner.engine.weights import Logits, hiding, softmax_weights, weighted


def span(name: str) -> AbstractContextManager[object]:
    """A range in torch's profiler; entering one costs microseconds even if none is running."""
    if profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"ctxprune.{name}")
    return nullcontext()


def step(page: Page, new: New, query: Tensor, logits: Logits, sight: Sight | None) -> Tensor:
    """Attend with one new token a sequence, where all sequences hold equally many rows.

    The host knows the count, so only slots in use are read.

    Args:
        query: (b, h, 1, d). logits: how weights come of it.
        sight: what it may see, by the positions of the page; None: all.

    Returns:
        (b, h, 1, d), d of the values.
    """
    count = page.used[0]
    with span("eviction"):
        page.write(new, count, count - page.settled[0])
    with span("attention"):
        key, value = page.rows(count + 1)
        visible = None if sight is None else in_sight(page, new, sight, count + 1)
        return attention(query, key, value, visible, logits)


def static_step(
    page: Page,
    new: New,
    query: Tensor,
    logits: Logits,
    sight: Sight | None,
    place: Tensor,
    stop: int | None,
    members: Tensor | None = None,
) -> Tensor:
    """The same by counts on the device: nothing of it depends on a number of the host.

    Args:
        place: (2, b) int64, the slot of each sequence's new row and of its waiting query; the last
            slot of both is for a sequence without a token.
        stop: slots to look at; None: all of them, so that shapes never change.
        members: (b,) int64, the sequences of the page that these are; None: all.
    """
    with span("eviction"):
        page.write(new, place[0, :, None], place[1, :, None], members)
    with span("attention"):
        key, value = page.rows(stop, members)
        visible = torch.arange(key.shape[2], device=key.device) <= place[0, :, None, None]
        if sight is not None:
            visible = visible & in_sight(page, new, sight, stop, members)
        return attention(query, key, value, visible, logits)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, logits: Logits
) -> Tensor:
    """`grouped_sdpa` where it computes these logits; else the same, written out."""
    if logits.plain:
        return grouped_sdpa(query, key, value, mask, logits.scale)
    if mask is not None and mask.dim() == 3:
        mask = hiding(query, key, mask)
    return weighted(softmax_weights(query, key, mask, logits), value, query)


def in_sight(
    page: Page, new: New, sight: Sight, stop: int | None, members: Tensor | None = None
) -> Tensor:
    """(b, q, r) bool: what new tokens may see of the first `stop` slots, by their positions."""
    assert new.position is not None
    position = page.position[:, :stop]
    if members is not None:
        position = position.index_select(0, members)
    return sight.sees(new.position[:, :, None], position[:, None])


def grouped_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of (b, h, q, d) to (b, h_kv, r, d).

    The mask is (b, q, r) bool, or (1 or b, 1, groups * q, r) to be added, or None: all see all.

    The query heads of a group are folded into the query axis, so keys and values are not repeated.
    """
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * queries, width)
    if mask is not None and mask.dim() == 3:
        mask = (
            mask[:, None].expand(-1, groups, -1, -1).reshape(-1, 1, groups * queries, key.shape[2])
        )
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, queries, value.shape[-1])
