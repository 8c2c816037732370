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
) -> None:
    """Ask the policy about some sequences of a layer, and let rows go.

    Args:
        members: the sequences. seen: tokens that each has read. stay: rows that each may keep.
        scale: of the attention's logits.
        expires: optional (b, total) int64, indexed by position: entry j is set to the position of
            the first query that does not see token j any more.
    """
    used = [page.used[i] for i in members]
    settled = [page.settled[i] for i in members]
    stay = [min(limit, rows) for limit, rows in zip(stay, used, strict=True)]
    everybody = len(members) == len(page.used)
    stop = max(used)
    index = None if everybody else torch.tensor(members, device=page.key.device)

    def of(tensor: Tensor, axis: int, size: int) -> Tensor:
        tensor = tensor if index is None else tensor.index_select(0, index)
        return tensor.narrow(axis, 0, size)

    held = Held(
        of(page.key, 2, stop),
        of(page.value, 2, stop),
        of(page.position, 1, stop),
        {name: of(column, 1, stop) for name, column in page.columns.items()},
    )
    even = len({*zip(used, settled, stay, strict=True)}) == 1
    count = max(u - s for u, s in zip(used, settled, strict=True))
    ages = [n - u for n, u in zip(seen, used, strict=True)]
    query = None if page.query is None else of(page.query, 2, count)
    features = None if page.features is None else of(page.features, 2, count)[:, 0]
    position: Tensor
    first: int | Tensor
    rows: int | Tensor
    if even:
        position, first = _settle(held, policy, settled[0], used[0], ages)
        rows = stay[0]
    else:
        position, first, rows = _settle_each(held, policy, settled, used, ages, stay)
    queries = Queries(position, first, features, rows, members, held, query, scale)
    score = policy.score(layer, held, queries)
    if stay != used:
        most = max(u - s for u, s in zip(used, stay, strict=True))
        gone, source, target = choose(score, held.position, rows, most)
        if expires is not None:
            which, slot = (gone & (held.position >= 0)).nonzero(as_tuple=True)
            sequence = torch.tensor(members, device=which.device)[which]
            now = torch.tensor(seen, device=which.device)[which]
            expires[sequence, held.position[which, slot]] = now
    if index is not None:
        page.position[index, :stop] = held.position
        for name, column in held.columns.items():
            page.columns[name][index, :stop] = column
    if stay != used:
        page.move(members, source, target)
    for i, rows_left in zip(members, stay, strict=True):
        page.used[i] = page.settled[i] = rows_left


def choose(
    score: Tensor, position: Tensor, stay: int | Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Who leaves, and which rows move into the slots that become free.

    Args:
        score, position: (s, r); position is -1 in free slots. stay: rows that stay, a number or
            (s, 1) int64. most: rows that leave a sequence at most.

    Returns:
        gone (s, r) bool: the rows of the least score, the oldest first among equals, and free
        slots. source, target (s, most): slots below `stay` are filled from behind it; pairs that
        are not needed copy what nobody reads, or a row onto itself.
    """
    slots = score.shape[1]
    by_age = position.argsort(dim=1)
    score = score.masked_fill(position < 0, -torch.inf).gather(1, by_age)
    order = by_age.gather(1, score.argsort(dim=1, stable=True))
    gone = torch.zeros_like(position, dtype=torch.bool)
    if isinstance(stay, int):
        leaving = order[:, : slots - stay]
        gone.scatter_(1, leaving, True)
        # As many slots are free before `stay` as rows stay behind it; both come first here.
        target = leaving.sort(dim=1).values
        source = gone[:, stay:].to(torch.uint8).argsort(dim=1, stable=True) + stay
        return gone, source, target
    place = torch.arange(slots, device=score.device)
    gone.scatter_(1, order, place < slots - stay)
    hole, survivor = gone & (place < stay), ~gone & (place >= stay)
    target, source = (
        flag.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        for flag in (hole, survivor)
    )
    return gone, torch.where(hole.gather(1, target), source, target), target


def _settle(
    held: Held, policy: Policy, first: int, stop: int, ages: Sequence[int]
) -> tuple[Tensor, int]:
    """Note what the new rows of slots `first` to `stop` are: their positions, and fresh columns."""
    age = torch.tensor(ages, device=held.key.device)[:, None]
    position = age + torch.arange(first, stop, device=held.key.device)
    held.position[:, first:] = position
    for name, column in held.columns.items():
        column[:, first:] = policy.fresh(name)
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
    for name, column in held.columns.items():
        column.masked_fill_(new if column.dim() == 2 else new[..., None], policy.fresh(name))
    rank = torch.arange(max(u - s for u, s in zip(used, settled, strict=True)), device=device)
    position = (first + age + rank).masked_fill(rank >= stop - first, -1)
    return position, first, rows
