"""A page: what one layer keeps of each sequence of a batch, in plain tensors of constant size.

Rows stand in slots 0, 1, 2 ... without a gap. New ones are written behind them; at an eviction step
the rows that stay move from the end into the slots of those that leave. The queries since the last
step wait beside them, to be judged by together. A page knows no model and no policy.

Axes: b batch, s some sequences of it, h heads, h_kv key heads, r slots, q waiting queries,
d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Slots are added by this share at a time where the rows have no limit.
GROWTH = 1 / 8


@dataclass(frozen=True)
class New:
    """What is written for n new tokens.

    Attributes:
        key, value: (b, h_kv, n, d), rotated.
        query: (b, h, n, d), rotated, or None where no policy asks for attention weights.
        features: (b, n, width) of the policy, or None.
    """

    key: Tensor
    value: Tensor
    query: Tensor | None
    features: Tensor | None

    def part(self, start: int, stop: int) -> New:
        """The tokens from `start` to `stop`."""
        query, features = self.query, self.features
        return New(
            self.key[:, :, start:stop],
            self.value[:, :, start:stop],
            None if query is None else query[:, :, start:stop],
            None if features is None else features[:, start:stop],
        )

    def taken(self, source: Tensor) -> New:
        """The tokens of columns `source` (b, columns)."""
        query, features = self.query, self.features
        return New(
            take(self.key, source),
            take(self.value, source),
            None if query is None else take(query, source),
            None if features is None else take(features[:, None], source)[:, 0],
        )


class Page:
    """The slots of one layer.

    Args:
        like: new tokens, whose shapes and dtypes the page takes. slots: of a sequence.
        waiting: queries that may wait. columns: name -> width of what a policy keeps of a row: a
            number (width 1, at least float32), or a vector in the keys' dtype.

    Attributes:
        key, value: (b, h_kv, r, d). position: (b, r) int64, -1 where nothing was settled yet.
        columns: (b, r), or (b, r, width). query, features: of the tokens since the last step.
        used: rows of each sequence. settled: how many of them an eviction step has seen.
    """

    def __init__(self, like: New, slots: int, waiting: int, columns: Mapping[str, int]) -> None:
        batch = like.key.shape[0]
        wide = torch.promote_types(like.key.dtype, torch.float32)
        # One slot more takes what is no token: the padding of ragged batches.
        self.key = _slots(like.key, slots + 1)
        self.value = _slots(like.value, slots + 1)
        self.position = torch.full((batch, slots + 1), -1, device=like.key.device)
        self.columns = {
            name: like.key.new_zeros((batch, slots + 1), dtype=wide)
            if width == 1
            else like.key.new_zeros((batch, slots + 1, width))
            for name, width in columns.items()
        }
        self.query = None if like.query is None else _slots(like.query, waiting + 1)
        features = None if like.features is None else like.features[:, None]
        self.features = None if features is None else _slots(features, waiting + 1)
        self.used = [0] * batch
        self.settled = [0] * batch

    @property
    def slots(self) -> int:
        """Rows that a sequence may hold."""
        return self.key.shape[2] - 1

    @property
    def waiting(self) -> int | None:
        """Queries that may wait; None: they are not kept."""
        kept = self.features if self.query is None else self.query
        return None if kept is None else kept.shape[2] - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, free slots and waiting queries included."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's key and value: what a dense cache holds of it."""
        pair = (self.key, self.value)
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in pair)

    def write(self, new: New, slot: int | Tensor, wait: int | Tensor) -> None:
        """Put new tokens into their slots.

        Args:
            slot, wait: where the first one goes among the rows and the waiting queries; or
                (b, n) int64 where each goes, the last slot being that of no token.
        """
        _put(self.key, new.key, slot)
        _put(self.value, new.value, slot)
        if self.query is not None and new.query is not None:
            _put(self.query, new.query, wait)
        if self.features is not None and new.features is not None:
            _put(self.features, new.features[:, None], wait)

    def grow(self, slots: int) -> None:
        """See that a sequence has so many slots."""
        if slots > self.slots:
            self.resize(slots + int(slots * GROWTH))

    def resize(self, slots: int, waiting: int | None = None) -> None:
        """Have so many slots, and room for so many waiting queries; what is in use stays."""
        self.key, self.value = (_resized(t, 2, slots + 1, 0) for t in (self.key, self.value))
        self.position = _resized(self.position, 1, slots + 1, -1)
        self.columns = {n: _resized(c, 1, slots + 1, 0) for n, c in self.columns.items()}
        if waiting is not None and self.query is not None:
            self.query = _resized(self.query, 2, waiting + 1, 0)
        if waiting is not None and self.features is not None:
            self.features = _resized(self.features, 2, waiting + 1, 0)

    def reorder(self, index: Tensor) -> None:
        """Make sequence i a copy of what sequence index[i] was, index (b',) int64."""
        for name, tensor in self._tensors().items():
            moved = tensor.index_select(0, index.to(tensor.device))
            if name in self.columns:
                self.columns[name] = moved
            else:
                setattr(self, name, moved)
        of = index.tolist()
        self.used = [self.used[i] for i in of]
        self.settled = [self.settled[i] for i in of]

    def move(self, members: Sequence[int], source: Tensor, target: Tensor) -> None:
        """Copy rows of some sequences to other slots, source and target (s, rows) int64."""
        every = torch.tensor(members, device=self.key.device)[:, None]
        for tensor in (self.key, self.value):
            heads, slots = tensor.shape[1:3]
            first = (every * heads + torch.arange(heads, device=tensor.device)) * slots
            rows = tensor.view(-1, tensor.shape[3])
            moved = rows.index_select(0, (first[:, :, None] + source[:, None]).flatten())
            rows.index_copy_(0, (first[:, :, None] + target[:, None]).flatten(), moved)
        for tensor in (self.position, *self.columns.values()):
            tensor[every, target] = tensor[every, source]

    def _tensors(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in ("key", "value", "position")}
        waiting = {name: getattr(self, name) for name in ("query", "features")}
        return {**own, **{n: t for n, t in waiting.items() if t is not None}, **self.columns}


@dataclass(frozen=True)
class Held:
    """The rows of some sequences at an eviction step, as a policy sees them.

    Attributes:
        key, value: (s, h_kv, r, d) of the slots in use. position: (s, r) int64, -1 if free.
        columns: what the policy keeps of each row, (s, r) or (s, r, width); written in place.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    columns: dict[str, Tensor]


@dataclass(frozen=True)
class Queries:
    """The tokens since the last eviction step, whose rows stand behind all others.

    Attributes:
        position: (s, q) int64; -1 where a sequence has fewer.
        first: the slot of the first one's row: a number, or (s, 1) int64 where they differ.
        features: (s, q, width) of the policy, or None.
        stay: rows that are going to stay: a number, or (s, 1) int64.
        members: the sequences of the batch that these are.
    """

    position: Tensor
    first: int | Tensor
    features: Tensor | None
    stay: int | Tensor
    members: Sequence[int]
    held: Held
    query: Tensor | None
    scale: float

    @property
    def newest(self) -> Tensor:
        """(s, 1) int64: the position of the last one."""
        return self.position.amax(dim=1, keepdim=True)

    @cached_property
    def weights(self) -> Tensor:
        """(s, q, r), float32 or wider: their attention to the rows, the mean over the heads.

        These are the weights that were used when they were read; 0 where there is no query.
        """
        assert self.query is not None, "a policy that asks for weights has `watches = True`"
        key = self.held.key
        batch, heads, queries, width = self.query.shape
        key_heads, rows = key.shape[1:3]
        slot = torch.arange(rows, device=key.device)
        own = self.first + torch.arange(queries, device=key.device)
        later = slot > own[..., None]
        folded = self.query.reshape(batch, key_heads, -1, width)
        logits = (folded @ key.transpose(2, 3)).mul_(self.scale)
        logits = logits.view(batch, heads, queries, rows)
        logits.masked_fill_(later if later.dim() == 2 else later[:, None], -torch.inf)
        wide = torch.promote_types(key.dtype, torch.float32)
        mean = logits.softmax(dim=-1, dtype=wide).mean(dim=1)
        if isinstance(self.first, Tensor):
            mean = mean.masked_fill((self.position < 0)[:, :, None], 0.0)
        return mean

    @property
    def received(self) -> Tensor:
        """(s, r): the attention that each row got from all of them."""
        return self.weights.sum(dim=1)

    def put(self, name: str, values: Tensor) -> None:
        """Set a column of their own rows to values (s, q) or (s, q, width)."""
        column = self.held.columns[name]
        if isinstance(self.first, int):
            column[:, self.first : self.first + values.shape[1]] = values
            return
        slot = torch.arange(column.shape[1], device=column.device)
        place = slot - self.first
        own = (place >= 0) & (place < (self.position >= 0).sum(dim=1, keepdim=True))
        place = place.clamp(0, values.shape[1] - 1)
        if column.dim() == 3:
            own, place = own[..., None], place[..., None].expand(-1, -1, values.shape[2])
        column.copy_(torch.where(own, values.gather(1, place), column))

    def own(self, tensor: Tensor) -> Tensor:
        """Their own rows (s, h, q, d) of a tensor (s, h, r, d) of the rows held."""
        count = self.position.shape[1]
        if isinstance(self.first, int):
            return tensor[:, :, self.first : self.first + count]
        slot = self.first + torch.arange(count, device=tensor.device)
        return take(tensor, slot.clamp_max(tensor.shape[2] - 1))


def take(tensor: Tensor, source: Tensor) -> Tensor:
    """Columns `source` (b, n) of a tensor (b, heads, columns, d)."""
    index = source[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def _slots(like: Tensor, slots: int) -> Tensor:
    """Zeros (b, heads, slots, d), as (b, heads, n, d) has it."""
    return like.new_zeros((*like.shape[:2], slots, like.shape[3]))


def _put(target: Tensor, new: Tensor, at: int | Tensor) -> None:
    """Write (b, heads, n, d) into slots of (b, heads, r, d)."""
    if isinstance(at, int):
        target[:, :, at : at + new.shape[2]] = new
    else:
        target.scatter_(2, at[:, None, :, None].expand_as(new), new)


def _resized(tensor: Tensor, axis: int, size: int, fill: int) -> Tensor:
    """The same with another number of slots; what does not fit is cut off."""
    shape = list(tensor.shape)
    kept = min(size, shape[axis])
    shape[axis] = size
    out = tensor.new_full(shape, fill)
    out.narrow(axis, 0, kept).copy_(tensor.narrow(axis, 0, kept))
    return out
