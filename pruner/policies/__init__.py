"""Eviction policies: one file each, found by its name. `make(request)` of that file builds it.

A policy answers one or both of two questions. `keep`: which rows does each query still want? It is
asked before attention, so a query that drops a token does not see it. `score`: which rows matter
least? It is asked after attention, once a sequence holds more rows than it may, at borders that
`budget` or a cap on rows sets. What it goes by is noted by `observe` and `digest`. Everything
counts in positions, so that one pass, single tokens and any batch decide alike.

Axes: b batch, q queries of the block, r rows of the table that are read, n tokens.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxprune.pruner.budget import Budget
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.errors import choose
from ctxprune.pruner.gate import Gate


@dataclass(frozen=True)
class Request:
    """What a policy is made from.

    Attributes:
        sparsity: share of the earlier tokens to drop, in [0, 1).
        contexts: lengths of the texts to come, one a sequence, or one for any batch.
        config: of the model; gates: one a layer.
    """

    sparsity: float
    contexts: tuple[int, ...]
    config: PruneConfig
    gates: Sequence[Gate]

    def even_budget(self, least: int = 1) -> Budget:
        """The same number of rows in every layer; `least` of them are never refused."""
        return self.budget([(1.0,) * len(self.gates)] * len(self.contexts), least)

    def budget(self, shares: Sequence[tuple[float, ...]], least: int) -> Budget:
        """Rows in these proportions between the layers, for each of the contexts."""
        device = self.gates[0].bias.device
        return Budget(self.sparsity, self.contexts, shares, least, device)


@dataclass(frozen=True)
class Block:
    """A block of consecutive queries.

    Attributes:
        position: (b, q) int64 from the first token of each sequence; -1 for padding.
        notes: what `Policy.annotate` gave for these tokens, (b, q, width) each.
        seen: at least the number of tokens that any sequence has seen by now.
        padded: some of the positions are -1.
    """

    position: Tensor
    notes: dict[str, Tensor]
    seen: int
    padded: bool

    def reordered(self, index: Tensor) -> Block:
        """Sequence i is what sequence index[i] was, index (b',) int64."""
        notes = {name: note.index_select(0, index) for name, note in self.notes.items()}
        return Block(self.position.index_select(0, index), notes, self.seen, self.padded)


class Policy:
    """Decides which rows stay. This one keeps all; a policy overrides what it needs.

    Attributes:
        columns: the notes that each row of the table has to carry.
        needs_weights: `observe` wants the attention weights, which are then computed apart.
        digests: blocks wait until the next border, and are given to `digest`.
        budget: rows that a sequence may hold, or None: `keep` decides alone.
    """

    columns: tuple[str, ...] = ()
    needs_weights = False
    digests = False
    budget: Budget | None = None

    def annotate(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Per-token features (b, n, width) of the attention's input hidden (b, n, hidden_size).

        Here: a number a column, at least float32, that starts at 0.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return {name: torch.zeros_like(hidden[..., :1], dtype=dtype) for name in self.columns}

    def keep(self, layer: int, table: Table, block: Block) -> Tensor | None:
        """(b, q, r) bool, True = query k would keep row j, and always its own; None: all of them.

        `attend` combines the answers along the queries, so that what is dropped stays dropped, and
        sees to causality and padding: for free slots and later rows any answer will do.
        """
        return None

    def observe(self, layer: int, table: Table, block: Block, weights: Tensor) -> None:
        """Note the attention weights (b, q, r), float32, mean over heads, 0 at padded queries."""

    def digest(self, layer: int, table: Table, block: Block) -> None:
        """Note what these queries think of the rows; asked once, before the next `score`.

        The block may join several that were read one after the other since the last border.
        """

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """(b, r) floats: the least leave first, among equals the oldest; +inf protects.

        Args:
            newest: (b, 1) int64, position of each sequence's newest token.
            limit: (b, 1) int64, rows that are going to stay.
        """
        return table.held.double()


def names() -> list[str]:
    """The policies there are, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make(name: str, request: Request) -> Policy:
    """Make the policy called `name`.

    Raises:
        CtxpruneError: no such policy, or it cannot serve this request.
    """
    module = importlib.import_module(f"{__name__}.{choose('policy', name, names())}")
    policy: Policy = module.make(request)
    return policy
