"""The eviction step: the policy scores the rows of a layer, and those of the least score leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine.page import Held, Page, Queries
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.policies import Policy


@torch.no_grad()
def evict(
    page: Page,
    policy: Policy,
    layer: int,
    members: Sequence[int],
    seen: Sequence[int],
    stay: Sequence[int],
    logits: Logits,
    expires: Tensor | None = None,
    sight: Sight | None = None,
) -> None:
    """Ask the policy about some sequences of a layer, and let rows go.

    Args:
        members: the sequences. seen: tokens that each has read. stay: rows that each may keep.
        logits: how the attention's weights come of products.
        expires: optional (b, total) int64, indexed by position: entry j is set to the position of
            the first query that does not see token j any more.
        sight: what queries may see, where that is not all: rows that no later one sees leave first.
    """
    used = [page.used[i] for i in members]
    settled = [page.settled[i] for i in members]
    stay = [min(limit, rows) for limit, rows in zip(stay, used, strict=True)]
    count = max(u - s for u, s in zip(used, settled, strict=True))
    ages = [n - u for n, u in zip(seen, used, strict=True)]
    index = None
    if len(members) < len(page.used):
        index = torch.tensor(members, device=page.key.device)
    held = page.held(index, max(used))
    position: Tensor
    first: int | Tensor
    rows: int | Tensor
    if len({*zip(used, settled, stay, strict=True)}) == 1:
        first, rows = settled[0], stay[0]
        position = settle(held, policy, first, used[0], ages)
    else:
        position, first, rows = _settle_each(held, policy, settled, used, ages, stay)
    query, features = page.waits(index, count)
    queries = Queries(position, first, features, rows, members, held, query, logits, sight=sight)
    policy.remember(layer, held, queries)
    order = None
    score = policy.score(layer, held, queries)
    if stay != used:
        if sight is not None:
            now = torch.tensor(seen, device=score.device)[:, None]
            unseen = ~sight.sees(now, held.position)
            score = score.masked_fill(unseen, torch.finfo(score.dtype).min)
        if isinstance(rows, Tensor):
            score = score.masked_fill(held.position < 0, -torch.inf)
        order = score.argsort(dim=1, stable=True)
        if expires is not None:
            note(expires, held.position, members, seen, order, rows)
    if index is not None:
        page.note(index, held)
    if order is not None:
        page.keep(index, staying(order, rows, max(stay)))
    for i, rows_left in zip(members, stay, strict=True):
        page.used[i] = page.settled[i] = rows_left


def staying(order: Tensor, stay: int | Tensor, most: int) -> Tensor:
    """The slots (s, most) int64 of the rows that stay, rising.

    Args:
        order: (s, r) slots, those that leave first. stay: rows that stay, a number or (s, 1) int64.
        most: the largest of these numbers; who keeps fewer has a slot r at the end instead.
    """
    slots = order.shape[1]
    if isinstance(stay, int):
        return order[:, slots - stay :].sort(dim=1).values
    leaves = torch.arange(slots, device=order.device) < slots - stay
    return order.masked_fill(leaves, slots).sort(dim=1).values[:, :most]


def note(
    expires: Tensor,
    position: Tensor,
    members: Sequence[int],
    seen: Sequence[int],
    order: Tensor,
    stay: int | Tensor,
) -> None:
    """Note in `expires` which query does not see the rows any more that leave: the next one.

    Args:
        position: (s, r) int64 of the rows, -1 where there is none. Others as in `evict` and
            `staying`.
    """
    place = torch.arange(order.shape[1], device=order.device)
    position = position.gather(1, order)
    which, at = ((place < order.shape[1] - stay) & (position >= 0)).nonzero(as_tuple=True)
    which, gone = which.to(expires.device), position[which, at].to(expires.device)
    sequence, now = torch.tensor([members, seen], device=expires.device)[:, which]
    # It may have been out of sight before.
    expires[sequence, gone] = torch.minimum(expires[sequence, gone], now)


def settle(held: Held, policy: Policy, first: int, stop: int, ages: Sequence[int]) -> Tensor:
    """Note what the new rows of slots `first` to `stop` are: fresh columns, and positions.

    Args:
        ages: tokens of each sequence that are gone.

    Returns:
        Their positions, (s, stop - first) int64.
    """
    slot = torch.arange(first, stop, device=held.key.device)
    position = slot + torch.tensor(ages, device=held.key.device)[:, None]
    held.position[:, first:stop] = position
    for name, value in policy.fresh.items():
        held.columns[name][:, first:stop] = value
    return position


def _settle_each(
    held: Held,
    policy: Policy,
    settled: Sequence[int],
    used: Sequence[int],
    ages: Sequence[int],
    stay: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where sequences differ; also returns first slots and what stays, (s, 1) int64."""
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
