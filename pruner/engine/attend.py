"""The evicting attention: write new rows, attend to what is held; no policy is asked in between.

Its twin for training is `soft.soft_attend`. Rows leave at eviction steps alone (`evict.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.nn import functional as F

from ctxprune.pruner.engine.page import New, Page
from ctxprune.pruner.engine.weights import causal, softmax_weights


def span(name: str) -> AbstractContextManager[object]:
    """A range in torch's profiler; entering one costs microseconds even if none is running."""
    if profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"ctxprune.{name}")
    return nullcontext()


def step(page: Page, new: New, query: Tensor, scale: float) -> Tensor:
    """Attend with one new token a sequence, where all sequences hold equally many rows.

    Shapes as in `read_block`. The host knows the count, so only slots in use are read.
    """
    count = page.used[0]
    with span("eviction"):
        page.write(new, count, count - page.settled[0])
    with span("attention"):
        key, value = page.key[:, :, : count + 1], page.value[:, :, : count + 1]
        return grouped_sdpa(query, key, value, None, scale)


def static_step(
    page: Page, new: New, query: Tensor, scale: float, place: Tensor, stop: int | None
) -> Tensor:
    """The same by counts on the device: nothing of it depends on a number of the host.

    Args:
        place: (2, b) int64, the slot of each sequence's new row and of its waiting query; the last
            slot of both is for a sequence without a token.
        stop: slots to look at; None: all of them, so that shapes never change.
    """
    with span("eviction"):
        page.write(new, place[0, :, None], place[1, :, None])
    with span("attention"):
        key, value = page.key[:, :, :stop], page.value[:, :, :stop]
        visible = torch.arange(key.shape[2], device=key.device) <= place[0, :, None, None]
        return grouped_sdpa(query, key, value, visible, scale)


def read_block(
    page: Page,
    new: New,
    query: Tensor,
    scale: float,
    counts: list[int],
    first: list[int],
    judged: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend with a block of new tokens, each to the rows held and to those before it in the block.

    Args:
        new: the tokens; query: (b, h, n, d). counts: tokens of each sequence in the block.
        first: column of each sequence's first one; they are consecutive.
        judged: an eviction step comes after the block.

    Returns:
        (b, h, n, d), finite where a sequence has no token; and the weights of all waiting queries
        (b, h_kv, groups * n, r), if the step asks for them and they are these.
    """
    length = query.shape[2]
    page.grow(max(used + count for used, count in zip(page.used, counts, strict=True)))
    if set(counts) == {length} and len(set(page.used)) == len(set(page.settled)) == 1:
        used = page.used[0]
        with span("eviction"):
            page.write(new, used, used - page.settled[0])
        with span("attention"):
            stop = used + length
            key, value = page.key[:, :, :stop], page.value[:, :, :stop]
            if page.query is None or not judged or used > page.settled[0]:
                mask = None if length == 1 else causal(query, key, used)[:, None]
                return grouped_sdpa(query, key, value, mask, scale), None
            weights = softmax_weights(query, key, causal(query, key, used), scale)
            return (weights.to(value.dtype) @ value).view_as(query), weights
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
        key, value = page.key[:, :, : max(stop, 1)], page.value[:, :, : max(stop, 1)]
        return grouped_sdpa(query, key, value, visible, scale), None


def grouped_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of (b, h, q, d) to (b, h_kv, r, d).

    The mask is (b, q, r) bool, or (1, 1, groups * q, r) to be added, or None: all see all.

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
