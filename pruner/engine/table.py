"""The KV cache of one layer as a table: rows are tokens, columns are tensors.

Attention is an operation on sets and keys carry their position, so the order of rows means
nothing: a new token takes the lowest free slot. Rows are ragged over the batch, and `position` is
-1 where a slot is free. The table knows no model and no policy.

Slots from `live` on are free in every sequence, so attention reads the slots before it alone.
`live` is a number of the host's that may be too high; every so often it is measured, and the rows
are packed if too many of the slots before it are free. Between two measurements nothing waits for
the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Capacity is a multiple of this many rows.
GRAIN = 16
# Single tokens between two measurements of `live` (docs/performance.md).
TIDY_EVERY = 32
# Rows are packed, and memory is freed, once more than this share of the slots read is free.
LOOSE = 1 / 8


class Table:
    """Ragged rows x named columns.

    Every column has shape (b, heads, capacity, width): `key`, `value`, and what a policy adds.
    `position` (b, capacity) int64 counts from the first token of its sequence.
    """

    def __init__(self) -> None:
        self.columns: dict[str, Tensor] = {}
        self.position: Tensor | None = None
        self.live = 0
        self._holes = False  # a slot before `live` may be free
        self._room = 0  # free slots that every sequence has at least
        self._stale = 0  # single tokens since `live` was measured

    @property
    def held(self) -> Tensor:
        """(b, live) int64: the position of the token in each slot that is read, -1 if free."""
        return self._position()[:, : self.live]

    def column(self, name: str) -> Tensor:
        """(b, heads, live, width), a view."""
        return self.columns[name][:, :, : self.live]

    def vector(self, name: str) -> Tensor:
        """(b, live), a view of a column of one number a row."""
        return self.column(name)[:, 0, :, 0]

    @property
    def capacity(self) -> int:
        """Slots a sequence, free ones included."""
        return 0 if self.position is None else self.position.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, free slots included."""
        tensors = list(self.columns.values())
        if self.position is not None:
            tensors.append(self.position)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    @property
    def dense_row_nbytes(self) -> int:
        """Bytes of one token's key and value: what a dense cache holds of it."""
        pair = [self.columns[name] for name in ("key", "value") if name in self.columns]
        return sum(c.shape[1] * c.shape[3] * c.element_size() for c in pair)

    def rows(self) -> Tensor:
        """(b,) int64: the tokens held by each sequence."""
        return (self.held >= 0).sum(dim=1)

    def append(self, position: Tensor, **columns: Tensor) -> None:
        """Put n new rows into free slots.

        Args:
            position: (b, n) int64; -1 marks padding, which leaves its slot free.
            columns: (b, heads, n, width) each, the same names at every call.
        """
        if self.position is None:
            self._create(position, columns)
        count = position.shape[1]
        single = count == 1 and self._holes
        if count > (self._room if single else self.capacity - self.live):
            self._tidy(count)
        if single:
            self._fill(position, columns)
        else:
            self._extend(position, columns)
        self._room -= count

    def evict(self, keep: Tensor, *, more: int = 0) -> None:
        """Drop rows, and free memory once the table is sparse.

        Args:
            keep: (b, live) bool, True = the row stays; free slots may hold anything.
            more: rows that the next call appends as one block, 0 while single tokens are read.
        """
        self.held.masked_fill_(~keep, -1)
        self._holes = True
        if self._stale >= TIDY_EVERY or self._stale == 0:
            self._tidy(more)

    def reorder(self, index: Tensor) -> None:
        """Make sequence i a copy of what sequence index[i] was (beam search), index (b',) int64."""
        self.columns = {n: c.index_select(0, index) for n, c in self.columns.items()}
        self.position = self._position().index_select(0, index)

    def _position(self) -> Tensor:
        assert self.position is not None, "the table is empty: append first"
        return self.position

    def _create(self, position: Tensor, columns: dict[str, Tensor]) -> None:
        self.position = position.new_full((position.shape[0], 0), -1)
        self.columns = {
            name: column.new_zeros((*column.shape[:2], 0, column.shape[3]))
            for name, column in columns.items()
        }

    def _extend(self, position: Tensor, columns: dict[str, Tensor]) -> None:
        """Write a block behind the live slots."""
        new = slice(self.live, self.live + position.shape[1])
        self._position()[:, new] = position
        for name, column in self.columns.items():
            column[:, :, new] = columns[name]
        self.live = new.stop
        # One token is no reason to measure; a block is.
        self._stale = self._stale + 1 if position.shape[1] == 1 else 0

    def _fill(self, position: Tensor, columns: dict[str, Tensor]) -> None:
        """Write one token a sequence into its lowest free slot; there is one, see `_room`."""
        self.live = min(self.live + 1, self.capacity)
        slot = self.held.argmin(dim=1, keepdim=True)
        self._position().scatter_(1, slot, position)
        for name, column in self.columns.items():
            new = columns[name]
            column.scatter_(2, slot[:, None, :, None].expand_as(new), new)
        self._stale += 1

    def _tidy(self, more: int) -> None:
        """Measure the rows; pack them, grow or shrink where it pays. The one wait for the device.

        Afterwards there is room for `more` rows, behind the live slots if they are a block.
        """
        most, high = self._measure()
        more = max(more, 1)
        slack = max(GRAIN, int((most + more) * LOOSE))
        self.live = high
        if not most + more <= self.capacity <= most + more + 2 * slack:
            self._pack(most, _round_up(most + more + slack))
        elif high - most > slack or high + more > self.capacity:
            self._pack(most, self.capacity)
        self._room = self.capacity - most
        self._stale = 1

    def _measure(self) -> tuple[int, int]:
        """The most rows that a sequence holds, and the slots up to the last one that is held."""
        if self.live == 0:
            return 0, 0
        held = self.held >= 0
        last = (held * torch.arange(1, self.live + 1, device=held.device)).amax()
        most, high = torch.stack([held.sum(dim=1).amax(), last]).tolist()
        return most, high

    def _pack(self, rows: int, capacity: int) -> None:
        """Bring the held rows to the front, in tensors of that capacity."""
        old = self.held
        order = (old < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :rows]
        front = old.gather(1, order)
        if capacity != self.capacity:
            self.position = old.new_empty((old.shape[0], capacity))
        self._position()[:, rows:] = -1
        self._position()[:, :rows] = front
        for name, column in self.columns.items():
            taken = _take(column, order)
            if column.shape[2] != capacity:
                column = column.new_zeros((*column.shape[:2], capacity, column.shape[3]))
                self.columns[name] = column
            column[:, :, :rows] = taken
        self.live = rows


def _take(column: Tensor, order: Tensor) -> Tensor:
    """Rows `order` (b, k) of a column (b, heads, n, width)."""
    batch, heads, slots, width = column.shape
    # Whole rows by one index: a gather by expanded indices moves single numbers.
    first = torch.arange(batch * heads, device=column.device).view(batch, heads, 1) * slots
    chosen = column.reshape(-1, width).index_select(0, (first + order[:, None]).flatten())
    return chosen.view(batch, heads, -1, width)


def _round_up(rows: int) -> int:
    return max(GRAIN, -(-rows // GRAIN) * GRAIN)
