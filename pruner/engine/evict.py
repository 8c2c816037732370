"""The eviction step: the policy scores the rows of a layer, and those of the least score leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxprune.pruner.engine.page import Held, Page, Queries
from ctxprune.pruner.policies import Policy


@torch.no_grad()
def evict(
    page: Page,
    policy: Policy,
    layer: int,
    members: Sequence[int],
    seen: Sequence[int],
    stay: Sequence[int],
    scale: float,
    expires: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Ask the policy about some sequences of a layer, and let rows go.

    Args:
        members: the sequences. seen: tokens that each has read. stay: rows that each may keep.
        scale: of the attention's logits.
        expires: optional (b, total) int64, indexed by position: entry j is set to the position of
            the first query that does not see token j any more.
        weights: of the waiting queries of all sequences, where the attention has them already.
    """
    used = [page.used[i] for i in members]
    settled = [page.settled[i] for i in members]
    stay = [min(limit, rows) for limit, rows in zip(stay, used, strict=True)]
    most = max(u - s for u, s in zip(used, stay, strict=True))
    count = max(u - s for u, s in zip(used, settled, strict=True))
    ages = [n - u for n, u in zip(seen, used, strict=True)]
    index = None
    if len(members) < len(page.used):
        index = torch.tensor(members, device=page.key.device)
        weights = None if weights is None else weights.index_select(0, index)
    held = page.held(index, max(used))
    position: Tensor
    first: int | Tensor
    rows: int | Tensor
    if len({*zip(used, settled, stay, strict=True)}) == 1:
        position, first, rows = *_settle(held, policy, settled[0], used[0], ages), stay[0]
    else:
        position, first, rows = _settle_each(held, policy, settled, used, ages, stay)
    query, features = page.waits(index, count)
    queries = Queries(position, first, features, rows, members, held, query, scale, weights)
    score = policy.score(layer, held, queries)
    if most:
        if isinstance(rows, Tensor):
            score = score.masked_fill(held.position < 0, -torch.inf)
        order = score.argsort(dim=1, stable=True)
        if expires is not None:
            _note(expires, held, members, seen, order, rows)
        source, target = moves(order, rows, most)
    if index is not None:
        page.note(index, held)
    if most:
        page.move(index, source, target)
    for i, rows_left in zip(members, stay, strict=True):
        page.used[i] = page.settled[i] = rows_left


def moves(order: Tensor, stay: int | Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Which rows move into the slots that become free, so that the first `stay` are in use.

    Args:
        order: (s, r) slots, those that leave first. stay: rows that stay, a number or (s, 1) int64.
        most: rows that leave a sequence at most.

    Returns:
        source, target: (s, most) int64. Rows that stay behind slot `stay` go to slots before it
        that are free; the pairs after them copy what nobody reads.
    """
    leaving = order.shape[1] - stay
    if isinstance(stay, int):
        target = order[:, :leaving].sort(dim=1).values[:, :stay]
        return order[:, leaving:].sort(dim=1, descending=True).values[:, :leaving], target
    slots = order.shape[1]
    place = torch.arange(slots, device=order.device)
    target = order.masked_fill(place >= leaving, slots).sort(dim=1).values[:, :most]
    source = order.masked_fill(place < leaving, -1).sort(dim=1, descending=True).values[:, :most]
    needed = (target < stay) & (source >= stay)
    # A page has a slot more than it may use, so there is one behind all of these.
    return torch.where(needed, source, slots), torch.where(needed, target, slots)


def _note(
    expires: Tensor,
    held: Held,
    members: Sequence[int],
    seen: Sequence[int],
    order: Tensor,
    stay: int | Tensor,
) -> None:
    """Note for the rows that leave which query does not see them any more: the next one."""
    place = torch.arange(order.shape[1], device=order.device)
    position = held.position.gather(1, order)
    which, at = ((place < order.shape[1] - stay) & (position >= 0)).nonzero(as_tuple=True)
    which, gone = which.to(expires.device), position[which, at].to(expires.device)
    sequence, now = torch.tensor([members, seen], device=expires.device)[:, which]
    expires[sequence, gone] = now


def _settle(
    held: Held, policy: Policy, first: int, stop: int, ages: Sequence[int]
) -> tuple[Tensor, int]:
    """Note what the new rows of slots `first` to `stop` are: their positions, and fresh columns."""
    slot = torch.arange(first, stop, device=held.key.device)
    position = slot + torch.tensor(ages, device=held.key.device)[:, None]
    held.position[:, first:] = position
    for name, value in policy.fresh.items():
        held.columns[name][:, first:] = value
    return position, first


def _settle_each(
    held: Held,
    policy: Policy,
    settled: Sequence[int],
    used: Sequence[int],
    ages: Sequence[int],
    stay: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where sequences differ; also returns what stays, all of them (s, 1) int64."""
    device = held.key.device
    first, stop, age, rows = torch.tensor([settled, used, ages, stay], device=device)[:, :, None]
    slot = torch.arange(held.position.shape[1], device=device)
    new = (slot >= first) & (slot < stop)
    placed = torch.where(new, slot + age, held.position).masked_fill(slot >= stop, -1)
    held.position.copy_(placed)
    for name, value in policy.fresh.items():
        held.columns[name].masked_fill_(new, value)
    rank = torch.arange(max(u - s for u, s in zip(used, settled, strict=True)), device=device)
    position = (first + age + rank).masked_fill(rank >= stop - first, -1)
    return position, first, rows
