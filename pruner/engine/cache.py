"""PrunedCache: one table a layer, in the shape that transformers expects of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ctxprune.pruner.budget import cap_period
from ctxprune.pruner.engine.attend import BLOCK, Cut, Reading, Tally
from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.policies import Block, Policy


class PrunedLayer(CacheLayerMixin):
    """The cache of one layer. Its length is that of the tokens seen, so that positions stay right.

    `update` hands the new keys and values on as they are: `attend` puts them into the table block
    by block, and evicts between the blocks.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = Table()
        self.waiting: list[Block] = []
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the table takes its shape from the first rows."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new tokens, and return them alone."""
        self.is_initialized = True
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that a dense cache would need; ours come from the table."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.table, self.waiting, self.seen = Table(), [], 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beam."""
        self.table.reorder(beam_idx)
        self.waiting = [block.reordered(beam_idx) for block in self.waiting]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: an evicted row cannot come back.

        Raises:
            CtxpruneError: always.
        """
        raise CtxpruneError(
            "a pruned cache cannot go back to an earlier token, so assisted decoding and prompt "
            "lookup do not work with it",
            "generate without an assistant, or at sparsity 0",
        )


class PrunedCache(Cache):
    """A KV cache whose rows leave when the policy drops them.

    Args:
        policy: decides. layers: of the model. block: queries that are attended to at once.
        max_rows: cap on the rows of a sequence in a layer, which holds at every moment.
        tally: counts what it attends to. record: also keep `expires`, a (b, n) int64 tensor a
            layer: the position of the first query that does not see token j any more, or the
            largest int64 if all do.
    """

    def __init__(
        self,
        policy: Policy,
        layers: int,
        *,
        block: int = BLOCK,
        max_rows: int | None = None,
        tally: Tally | None = None,
        record: bool = False,
    ) -> None:
        super().__init__(layers=[PrunedLayer() for _ in range(layers)])
        self.policy = policy
        self.block = block
        self.max_rows = max_rows
        self.tally = tally
        self.reading: Reading | None = None
        self.tokens: Tensor | None = None
        self._counts: list[int] = []  # `tokens` as the host knows them, so that it need not ask
        self.expires: list[Tensor] | None = [] if record else None

    def advance(self, batch: int, length: int, mask: Tensor | None, device: torch.device) -> None:
        """Give positions to the `length` tokens of the forward pass that begins, and cut it up.

        Args:
            mask: (b, at least length) of 1 for real tokens and 0 for padding; None: all real.
        """
        if self.tokens is None:
            self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
            self._counts = [0] * batch
        position = self.tokens[:, None] + torch.arange(length, device=device)
        padded = mask is not None and not bool(mask[:, -length:].all())
        if mask is not None and padded:
            real = mask[:, -length:].to(torch.int64)
            position = self.tokens[:, None] + real.cumsum(dim=1) - 1
            position = position.masked_fill(real == 0, -1)
            self.tokens = self.tokens + real.sum(dim=1)
            places: list[Sequence[int]] = [tuple(row) for row in position.tolist()]
            self._counts = self.tokens.tolist()
        else:
            self.tokens = self.tokens + length
            places = [range(count, count + length) for count in self._counts]
            self._counts = [count + length for count in self._counts]
        seen = self.get_seq_length() + length
        blocks = self._cut(places, length)
        self.reading = Reading(position, seen, padded, blocks, self.max_rows, self.tally)
        if self.expires is not None:
            self._lengthen_record(int(self.tokens.max()))

    def layer(self, layer: int) -> PrunedLayer:
        """The cache of one layer."""
        pruned = self.layers[layer]
        assert isinstance(pruned, PrunedLayer)
        return pruned

    def table(self, layer: int) -> Table:
        """The rows that layer still holds."""
        return self.layer(layer).table

    def tables(self) -> list[Table]:
        """All tables, in layer order."""
        return [self.table(layer) for layer in range(len(self.layers))]

    @property
    def nbytes(self) -> int:
        """Bytes of all columns of all layers, free slots included."""
        return sum(table.nbytes for table in self.tables())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the keys and values that a dense cache would hold for the tokens seen."""
        if self.tokens is None:
            return 0
        widest = int(self.tokens.max()) * len(self.tokens)
        return sum(table.dense_row_nbytes for table in self.tables()) * widest

    @property
    def sparsity(self) -> float:
        """Share of the tokens seen that are gone, over layers and sequences."""
        if self.tokens is None:
            return 0.0
        seen = int(self.tokens.sum())
        return 1.0 - self.rows * len(self.tokens) / seen if seen else 0.0

    @property
    def rows(self) -> float:
        """Rows that a layer holds of a sequence, on average."""
        if self.tokens is None:
            return 0.0
        held = sum(int(table.rows().sum()) for table in self.tables())
        return held / (len(self.layers) * len(self.tokens))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows and counts follow their beam."""
        super().reorder_cache(beam_idx)
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, beam_idx)
            same = len(set(self._counts)) == 1
            self._counts = self._counts[:1] * len(beam_idx) if same else self.tokens.tolist()

    def batch_select_indices(self, indices: Tensor) -> None:
        """These sequences alone, indices (b',) int64."""
        self.reorder_cache(indices)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        if self.tokens is not None:
            every = torch.arange(len(self.tokens), device=self.tokens.device)
            self.batch_select_indices(every.repeat_interleave(repeats))

    def expiry(self, layer: int) -> Tensor | None:
        """The record of a layer, (b, n) int64, or None where none is kept."""
        return None if self.expires is None else self.expires[layer]

    def _cut(self, places: Sequence[Sequence[int]], length: int) -> tuple[tuple[Cut, ...], ...]:
        """The blocks of each layer, see `Reading`."""
        cap = [] if self.max_rows is None else [(cap_period(self.max_rows),)]

        @cache
        def blocks(periods: tuple[int, ...]) -> tuple[Cut, ...]:
            borders = {end for some in (*cap, periods) for end in _borders(places, some)}
            return _blocks(length, self.block, borders)

        budget = self.policy.budget
        return tuple(map(blocks, [()] * len(self.layers) if budget is None else budget.periods))

    def _lengthen_record(self, total: int) -> None:
        assert self.expires is not None and self.tokens is not None
        if not self.expires:
            self.expires = [self.tokens.new_zeros(len(self.tokens), 0) for _ in self.layers]
        for layer, old in enumerate(self.expires):
            never = torch.iinfo(torch.int64).max
            grown = old.new_full((old.shape[0], total), never)
            grown[:, : old.shape[1]] = old
            self.expires[layer] = grown


def _borders(places: Sequence[Sequence[int]], periods: Sequence[int]) -> Iterator[int]:
    """Ends of blocks at which some sequence has read a `period`-th token.

    Args:
        places: position of each token, -1 for padding, sequence by sequence.
        periods: of each sequence, or one for all.
    """
    for place, period in set(zip(places, cycle(periods), strict=False)):
        if isinstance(place, range):
            yield from range(period - place.start % period, len(place) + 1, period)
        else:
            yield from (at + 1 for at, p in enumerate(place) if p >= 0 and (p + 1) % period == 0)


def _blocks(length: int, block: int, borders: set[int]) -> tuple[Cut, ...]:
    """Blocks of at most `block` queries that end at every border."""
    blocks, start = [], 0
    for end in sorted(borders | {length}):
        while start < end:
            stop = min(start + block, end)
            blocks.append((start, stop, stop in borders))
            start = stop
    return tuple(blocks)
