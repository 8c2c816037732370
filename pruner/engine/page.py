"""A page: what one layer keeps of each sequence of a batch, in plain tensors of constant size.

Rows stand in slots 0, 1, 2 ... without a gap, in the order of their positions. New ones are written
behind them; at an eviction step those that stay close ranks. The queries since the last step wait
beside them, to be judged by together. A page knows no model and no policy.

Axes: b batch, s some sequences of it, h heads, h_kv key heads, r slots, q waiting queries,
d head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine.weights import (
    Logits,
    causal,
    earlier,
    hiding,
    softmax_weights,
    weighted,
)

# Latents (b, 1, r, width) each, as the cache is given them -> keys and values (b, h, r, d).
Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Slots are added by this share at a time where the rows have no limit.
GROWTH = 1 / 8
# Bytes at whose multiples a tensor begins in memory that is given.
ALIGNMENT = 64


@dataclass(frozen=True)
class New:
    """What is written for n new tokens.

    Attributes:
        key, value: (b, h_kv, n, d), rotated; or what they are expanded from.
        query: (b, h, n, d), rotated, or None where no policy asks for attention weights.
        features: (b, n, width) of the policy, or None.
        position: (b, n) int64, where it must be known before the next eviction step; else None.
    """

    key: Tensor
    value: Tensor
    query: Tensor | None
    features: Tensor | None
    position: Tensor | None = None

    def part(self, start: int, stop: int) -> New:
        """The tokens from `start` to `stop`."""
        query, features = self.query, self.features
        return New(
            self.key[:, :, start:stop],
            self.value[:, :, start:stop],
            None if query is None else query[:, :, start:stop],
            None if features is None else features[:, start:stop],
            None if self.position is None else self.position[:, start:stop],
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
        expand: makes keys and values of latents, which are kept in their place (DeepSeek's MLA,
            arXiv 2405.04434); None: they are kept themselves.

    Attributes:
        key, value: (b, h_kv, r, d), as they are kept.
        position: (b, r) int64, -1 where nothing was settled yet.
        numbers: (b, r, k) the columns of one number. vectors: (b, r, width) of each other column.
        query, features: of the tokens since the last step.
        used: rows of each sequence. settled: how many of them an eviction step has seen.
    """

    def __init__(
        self,
        like: New,
        slots: int,
        waiting: int,
        columns: Mapping[str, int],
        expand: Expand | None = None,
    ) -> None:
        batch, new = like.key.shape[0], like.key.new_zeros
        wide = torch.promote_types(like.key.dtype, torch.float32)
        self._names = [name for name, width in columns.items() if width == 1]
        self._expand = expand
        # One slot more takes what is no token: the padding of ragged batches.
        self.key = _slots(like.key, slots + 1)
        self.value = _slots(like.value, slots + 1)
        self.position = torch.full((batch, slots + 1), -1, device=like.key.device)
        self.numbers = new((batch, slots + 1, len(self._names)), dtype=wide)
        self.vectors = {n: new((batch, slots + 1, w)) for n, w in columns.items() if w > 1}
        self.query = None if like.query is None else _slots(like.query, waiting + 1)
        features = None if like.features is None else like.features[:, None]
        self.features = None if features is None else _slots(features, waiting + 1)
        self.used = [0] * batch
        self.settled = [0] * batch

    @classmethod
    def over(cls, like: Page, memory: Tensor) -> Page:
        """A page for many sequences, shaped like that of one, which lies in memory that is given.

        Args:
            like: may be without data. memory: (sequences, like.aligned_nbytes) int8, zero, without
                gaps. Each tensor takes a part of it for all sequences.
        """
        page, count, parts = copy.copy(like), len(memory), memory.view(-1)
        page.vectors = dict(like.vectors)
        for name, (tensor, _) in like._tensors().items():
            part, parts = parts[: count * tensor.nbytes], parts[count * _aligned(tensor) :]
            page._set(name, part.view(tensor.dtype).view(count, *tensor.shape[1:]))
        page.used, page.settled = [0] * count, [0] * count
        return page

    def alone(self, sequence: int, used: int, settled: int) -> Page:
        """A page of one of the sequences, in the same memory, with so many rows."""
        page = copy.copy(self)
        page.vectors = dict(self.vectors)
        for name, (tensor, _) in self._tensors().items():
            page._set(name, tensor.narrow(0, sequence, 1))
        page.used, page.settled = [used], [settled]
        return page

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
        return sum(tensor.nbytes for tensor, _ in self._tensors().values())

    @property
    def aligned_nbytes(self) -> int:
        """Bytes of memory that `over` takes for each sequence, for a page of one like this."""
        return sum(_aligned(tensor) for tensor, _ in self._tensors().values())

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's key and value, or latents: what a dense cache holds of it."""
        pair = (self.key, self.value)
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in pair)

    def write(
        self, new: New, slot: int | Tensor, wait: int | Tensor, members: Tensor | None = None
    ) -> None:
        """Put new tokens into their slots.

        Args:
            slot, wait: where the first one goes among the rows and the waiting queries; or
                (b, n) int64 where each goes, the last slot being that of no token.
            members: (b,) int64, the sequences that they are of; None: all.
        """
        _put(self.key, new.key, slot, members)
        _put(self.value, new.value, slot, members)
        if new.position is not None:
            _put(self.position[:, None, :, None], new.position[:, None, :, None], slot, members)
        if self.query is not None and new.query is not None:
            _put(self.query, new.query, wait, members)
        if self.features is not None and new.features is not None:
            _put(self.features, new.features[:, None], wait, members)

    def rows(self, stop: int | None, members: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h_kv, stop, d) of the first slots, or of all; copies of `members`."""
        pair = self.key[:, :, :stop], self.value[:, :, :stop]
        if members is not None:
            pair = pair[0].index_select(0, members), pair[1].index_select(0, members)
        return pair if self._expand is None else self._expand(*pair)

    def held(self, members: Tensor | None, stop: int) -> Held:
        """The first `stop` slots of all sequences (None), as views, or copies of some."""

        def of(tensor: Tensor, axis: int) -> Tensor:
            tensor = tensor if members is None else tensor.index_select(0, members)
            return tensor.narrow(axis, 0, stop)

        numbers = of(self.numbers, 1)
        columns = dict(zip(self._names, numbers.unbind(dim=2), strict=True))
        columns |= {name: of(vector, 1) for name, vector in self.vectors.items()}
        pair = of(self.key, 2), of(self.value, 2)
        pair = pair if self._expand is None else self._expand(*pair)
        return Held(*pair, of(self.position, 1), columns, numbers)

    def waits(self, members: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
        """The first `count` waiting queries (s, h, q, d), and features (s, q, width)."""
        pair = [
            tensor if members is None or tensor is None else tensor.index_select(0, members)
            for tensor in (self.query, self.features)
        ]
        query, features = (None if t is None else t[:, :, :count] for t in pair)
        return query, None if features is None else features[:, 0]

    def note(self, members: Tensor, held: Held) -> None:
        """Take back what a policy wrote into copies."""
        stop = held.position.shape[1]
        self.position[members, :stop] = held.position
        self.numbers[members, :stop] = held.numbers
        for name, vector in self.vectors.items():
            vector[members, :stop] = held.columns[name]

    def grow(self, slots: int) -> None:
        """See that a sequence has so many slots."""
        if slots > self.slots:
            self.resize(slots + int(slots * GROWTH))

    def resize(self, slots: int, waiting: int | None = None) -> None:
        """Have so many slots, and room for so many waiting queries; what is in use stays."""
        for name, (tensor, axis) in self._tensors().items():
            waits = name in ("query", "features")
            size = slots if not waits else waiting
            if size not in (None, tensor.shape[axis] - 1):
                self._set(name, _resized(tensor, axis, size + 1))

    def reorder(self, index: Tensor) -> None:
        """Make sequence i a copy of what sequence index[i] was, index (b',) int64."""
        for name, (tensor, _) in self._tensors().items():
            self._set(name, tensor.index_select(0, index.to(tensor.device)))
        of = index.tolist()
        self.used = [self.used[i] for i in of]
        self.settled = [self.settled[i] for i in of]

    def wider(self, new: New) -> Page:
        """A page with the same rows and these behind them, in which no query waits."""
        used = self.used[0]
        twin = copy.copy(self)
        twin.query = twin.features = None
        twin.vectors = dict(self.vectors)
        twin.resize(used + new.key.shape[2])
        _put(twin.key, new.key, used, None)
        _put(twin.value, new.value, used, None)
        return twin

    def keep(self, members: Tensor | None, kept: Tensor, source: Page | None = None) -> None:
        """Have the rows of slots `kept` (s, n) int64 of some sequences (None: all) alone, in front.

        They are taken from `source`, a page that is `wider`, or None: this one. Its last slot
        stands for no row.
        """
        source = self if source is None else source
        batch, heads, slots, _ = source.key.shape
        first = torch.arange(batch, device=kept.device) if members is None else members
        first = first[:, None] * slots
        place = (first + kept).flatten()
        for mine, theirs in zip(self._columns(), source._columns(), strict=True):
            rows = theirs.flatten(0, 1).index_select(0, place)
            _put_back(mine, members, rows.view(*kept.shape, rows.shape[-1]))
        head = torch.arange(heads, device=kept.device)[:, None] * slots
        place = (first[:, None] * heads + head + kept[:, None]).flatten()
        for mine, theirs in ((self.key, source.key), (self.value, source.value)):
            rows = theirs.flatten(0, 2).index_select(0, place)
            _put_back(mine, members, rows.view(len(kept), heads, -1, rows.shape[-1]))

    def _columns(self) -> list[Tensor]:
        """What is kept of each row beside its key and value, (b, r, width) each."""
        return [self.position[..., None], self.numbers, *self.vectors.values()]

    def _tensors(self) -> dict[str, tuple[Tensor, int]]:
        """Each tensor by its name, and its axis of slots."""
        own = {"key": 2, "value": 2, "position": 1, "numbers": 1, "query": 2, "features": 2}
        named = {n: (getattr(self, n), a) for n, a in own.items() if getattr(self, n) is not None}
        return named | {name: (vector, 1) for name, vector in self.vectors.items()}

    def _set(self, name: str, tensor: Tensor) -> None:
        if name in self.vectors:
            self.vectors[name] = tensor
        else:
            setattr(self, name, tensor)


@dataclass(frozen=True)
class Held:
    """The rows of some sequences at an eviction step, as a policy sees them.

    Attributes:
        key, value: (s, h_kv, r, d) of the slots in use. position: (s, r) int64, -1 if free.
        columns: what the policy keeps of each row, (s, r) or (s, r, width); written in place.
        numbers: (s, r, k), all columns of one number.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    columns: dict[str, Tensor]
    numbers: Tensor

    def front(self, stop: int) -> Held:
        """The first `stop` slots, as views."""
        columns = {name: column[:, :stop] for name, column in self.columns.items()}
        pair = self.key[:, :, :stop], self.value[:, :, :stop]
        return Held(*pair, self.position[:, :stop], columns, self.numbers[:, :stop])


@dataclass(frozen=True)
class Queries:
    """The tokens since the last eviction step, whose rows stand behind all others.

    Attributes:
        position: (s, q) int64; -1 where a sequence has fewer.
        first: the slot of the first one's row: a number, or (s, 1) int64 where they differ.
        features: (s, q, width) of the policy, or None.
        stay: rows that are going to stay: a number, or (s, 1) int64.
        members: the sequences of the batch that these are.
        query: (s, h, q, d), rotated. logits: how weights come of it.
        sight: what they may see, where that is not all.
        hidden: (s, r), True where a row is gone and its slot not yet free; None: nowhere.
    """

    position: Tensor
    first: int | Tensor
    features: Tensor | None
    stay: int | Tensor
    members: Sequence[int]
    held: Held
    query: Tensor | None
    logits: Logits
    hidden: Tensor | None = None
    sight: Sight | None = None

    @property
    def newest(self) -> Tensor:
        """(s, 1) int64: the position of the last one."""
        return self.position.amax(dim=1, keepdim=True)

    @cached_property
    def weights(self) -> Tensor:
        """(s, q, r), float32 or wider: their attention to the rows, the mean over the heads.

        These are the weights that were used when they were read; 0 where there is no query.
        """
        mean: Tensor = self._weights.unflatten(2, (-1, self.position.shape[1])).mean(dim=(1, 2))
        return mean

    @cached_property
    def received(self) -> Tensor:
        """(s, r): the attention that each row got from all of them, the sum over heads."""
        return self._weights.sum(dim=(1, 2))

    def attended(self, query: Tensor) -> Tensor:
        """What their attention gives, as (s, h, q, d) of query."""
        return weighted(self._weights, self.held.value, query)

    def part(self, start: int, stop: int) -> Queries:
        """Those from the number `start` to `stop` alone."""
        return self.at_step(start, stop, self.held, self.stay, self.hidden)

    def at_step(
        self, start: int, stop: int, held: Held, stay: int | Tensor, hidden: Tensor | None
    ) -> Queries:
        """The same, with what else is different at a step in between."""
        query, features = self.query, self.features
        # Not `replace`, which takes five times as long.
        return Queries(
            self.position[:, start:stop],
            self.first + start,
            None if features is None else features[:, start:stop],
            stay,
            self.members,
            held,
            None if query is None else query[:, :, start:stop],
            self.logits,
            hidden,
            self.sight,
        )

    @cached_property
    def _weights(self) -> Tensor:
        """(s, h_kv, groups * q, r): the softmax of the logits, of the queries as they stand."""
        assert self.query is not None, "a policy that asks for weights has `watches = True`"
        query, key = self.query, self.held.key
        if isinstance(self.first, int) and self.sight is None:
            mask = causal(query, key, self.first, self.hidden)
            return softmax_weights(query, key, mask, self.logits)
        visible, none = earlier(query, key, self.first), self.position < 0
        if self.sight is not None:
            seen = self.sight.sees(self.position[:, :, None], self.held.position[:, None, :])
            visible = visible & (seen | none[:, :, None])
        weights = softmax_weights(query, key, hiding(query, key, visible), self.logits)
        if isinstance(self.first, int):
            return weights
        absent = none.repeat(1, query.shape[1] // key.shape[1])
        return weights.masked_fill_(absent[:, None, :, None], 0.0)

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


def _aligned(tensor: Tensor) -> int:
    """Its bytes, as many more as the next tensor needs to begin at a multiple of `ALIGNMENT`."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _put(target: Tensor, new: Tensor, at: int | Tensor, members: Tensor | None) -> None:
    """Write (b, heads, n, d) into slots of (b, heads, r, d), or of some of its sequences."""
    if isinstance(at, int):
        target[:, :, at : at + new.shape[2]] = new
    elif members is not None:
        target[members[:, None], :, at] = new.transpose(1, 2)
    else:
        target.scatter_(2, at[:, None, :, None].expand_as(new), new)


def _put_back(tensor: Tensor, members: Tensor | None, rows: Tensor) -> None:
    """Set the first slots of some sequences to (s, n, width), or (s, heads, n, width)."""
    front = tensor.narrow(-2, 0, rows.shape[-2])
    if members is None:
        front.copy_(rows)
    else:
        front[members] = rows


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The same with another number of slots; what does not fit is cut off."""
    shape = list(tensor.shape)
    kept = min(size, shape[axis])
    shape[axis] = size
    out = tensor.new_zeros(shape)
    out.narrow(axis, 0, kept).copy_(tensor.narrow(axis, 0, kept))
    return out
