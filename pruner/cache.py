"""PrunedCache: one table a layer, in the shape that transformers expects of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ctxprune.pruner.attend import Tally
from ctxprune.pruner.policies import Policy
from ctxprune.pruner.table import Table


class PrunedLayer(CacheLayerMixin):
    """The cache of one layer. Its length is that of the tokens seen, so that positions stay right.

    `update` hands the new keys and values on as they are: `attend` puts them into the table block
    by block, and evicts between the blocks.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = Table()
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
        self.table, self.seen, self.is_initialized = Table(), 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beam."""
        self.table.reorder(beam_idx)


class PrunedCache(Cache):
    """A KV cache whose rows leave when the policy drops them.

    Args:
        policy: decides; layers: of the model; tally: counts what it attended to.
        record: also keep `expires`, a (b, n) int64 tensor a layer: the position of the query that
            dropped token j, or the largest int64 if none did.
    """

    def __init__(self, policy: Policy, layers: int, tally: Tally, *, record: bool = False) -> None:
        super().__init__(layers=[PrunedLayer() for _ in range(layers)])
        self.policy = policy
        self.tally = tally
        self.position: Tensor | None = None
        self.tokens: Tensor | None = None
        self.expires: list[Tensor] | None = [] if record else None

    def advance(self, batch: int, length: int, mask: Tensor | None, device: torch.device) -> None:
        """Give positions to the `length` tokens of the forward pass that begins.

        Args:
            mask: (b, at least length) of 1 for real tokens and 0 for padding; None: all real.
        """
        if mask is None:
            real = torch.ones(batch, length, dtype=torch.int64, device=device)
        else:
            real = mask[:, -length:].to(torch.int64)
        if self.tokens is None:
            self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        position = self.tokens[:, None] + real.cumsum(dim=1) - 1
        self.position = position.masked_fill(real == 0, -1)
        self.tokens = self.tokens + real.sum(dim=1)
        if self.expires is not None:
            self._lengthen_record(int(self.tokens.max()))

    def table(self, layer: int) -> Table:
        """The rows that layer still holds."""
        pruned = self.layers[layer]
        assert isinstance(pruned, PrunedLayer)
        return pruned.table

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
        held = sum(int(table.rows().sum()) for table in self.tables())
        seen = int(self.tokens.sum()) * len(self.layers)
        return 1.0 - held / seen if seen else 0.0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows and counts follow their beam."""
        super().reorder_cache(beam_idx)
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, beam_idx)

    def expiry(self, layer: int) -> Tensor | None:
        """The record of a layer, (b, n) int64, or None where none is kept."""
        return None if self.expires is None else self.expires[layer]

    def _lengthen_record(self, total: int) -> None:
        assert self.expires is not None and self.tokens is not None
        if not self.expires:
            self.expires = [self.tokens.new_zeros(len(self.tokens), 0) for _ in self.layers]
        for layer, old in enumerate(self.expires):
            never = torch.iinfo(torch.int64).max
            grown = old.new_full((old.shape[0], total), never)
            grown[:, : old.shape[1]] = old
            self.expires[layer] = grown
