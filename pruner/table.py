"""The KV cache of one layer as a table: rows are tokens, columns are tensors.

Attention is an operation on sets and keys carry their position, so the order of rows means
nothing: a new token takes any free slot. Rows are ragged over the batch, and `position` is -1
where a slot is free. The table knows no model and no policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Capacity is a multiple of this many rows.
GRAIN = 16


class Table:
    """Ragged rows x named columns.

    Every column has shape (b, heads, capacity, width): `key`, `value`, and what a policy adds.
    `position` (b, capacity) int64 counts from the first token of its sequence.
    """

    def __init__(self) -> None:
        self.columns: dict[str, Tensor] = {}
        self.position: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """(b, capacity) bool: the slots that hold a token."""
        return self._position() >= 0

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
        return self.valid.sum(dim=1)

    def append(self, position: Tensor, **columns: Tensor) -> None:
        """Put n new rows into free slots.

        Args:
            position: (b, n) int64; -1 marks padding, which takes no slot.
            columns: (b, heads, n, width) each, the same names at every call.
        """
        if self.position is None:
            self._create(position, columns)
        held = self._position()
        needed = int(((held >= 0).sum(dim=1) + (position >= 0).sum(dim=1)).max())
        if needed > self.capacity:
            self._resize(needed)
            held = self._position()
        # Free slots first; the real tokens of each sequence first: they meet pairwise.
        slots = (held >= 0).to(torch.int8).argsort(dim=1, stable=True)
        order = (position < 0).to(torch.int8).argsort(dim=1, stable=True)
        count = min(position.shape[1], self.capacity)
        slots, order = slots[:, :count], order[:, :count]
        new = position.gather(1, order)
        # Padding that meets a held slot must leave it as it is.
        new = torch.where(new >= 0, new, held.gather(1, slots))
        real = position.gather(1, order) >= 0
        held.scatter_(1, slots, new)
        for name, column in self.columns.items():
            index = slots[:, None, :, None]
            fresh = _take(columns[name], order)
            index = index.expand_as(fresh)
            kept = column.gather(2, index)
            column.scatter_(2, index, torch.where(real[:, None, :, None], fresh, kept))

    def evict(self, keep: Tensor) -> None:
        """Drop rows, and free memory once the table is sparse.

        Args:
            keep: (b, capacity) bool, True = the row stays; free slots may hold anything.
        """
        position = self._position()
        position.masked_fill_(~keep, -1)
        most = int(self.rows().max())
        # A quarter of slack avoids a copy at every other step.
        if _round_up(most) + max(GRAIN, _round_up(most) // 4) < self.capacity:
            self._resize(most)

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

    def _resize(self, rows: int) -> None:
        """Copy the held rows into tensors of the capacity for `rows`, an eighth to spare."""
        capacity = _round_up(rows + rows // 8)
        old = self._position()
        order = (old < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :capacity]
        self.position = old.new_full((old.shape[0], capacity), -1)
        self.position[:, : order.shape[1]] = old.gather(1, order)
        for name, column in self.columns.items():
            fresh = column.new_zeros((*column.shape[:2], capacity, column.shape[3]))
            fresh[:, :, : order.shape[1]] = _take(column, order)
            self.columns[name] = fresh


def _take(column: Tensor, order: Tensor) -> Tensor:
    """Rows `order` (b, k) of a column (b, heads, n, width)."""
    index = order[:, None, :, None].expand(-1, column.shape[1], -1, column.shape[3])
    return column.gather(2, index)


def _round_up(rows: int) -> int:
    return max(GRAIN, -(-rows // GRAIN) * GRAIN)
