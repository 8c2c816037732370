"""Eviction policies: one file each, found by its name. `make(request)` of that file builds it.

A policy answers one or both of two questions. `keep`: which rows does each query still want? It is
asked before attention, so a query that drops a token does not see it. `score`: which rows matter
least? It is asked after attention, once a sequence holds more rows than it may: after every
`PERIOD`-th of its tokens, where `budget` or a cap on rows says so (a small cap: more often).
Everything counts in positions, so that one pass, single tokens and any batch decide alike.

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
from ctxprune.pruner.errors import choose
from ctxprune.pruner.gate import Gate
from ctxprune.pruner.table import Table


@dataclass(frozen=True)
class Request:
    """What a policy is made from.

    Attributes:
        sparsity: share of the earlier tokens to drop, in [0, 1).
        context: length of the texts to come, or None where it is unknown: a policy with a budget
            then keeps its share of the tokens seen so far, at every moment.
        config: of the model; gates: one a layer.
        max_rows: cap on the rows of a sequence in a layer, or None.
    """

    sparsity: float
    context: int | None
    config: PruneConfig
    gates: Sequence[Gate]
    max_rows: int | None = None


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


class Policy:
    """Decides which rows stay. This one keeps all; a policy overrides what it needs.

    Attributes:
        columns: the notes that each row of the table has to carry.
        needs_weights: `observe` wants the attention weights, which are then computed apart.
        budget: rows that a sequence may hold, or None: `keep` decides alone.
    """

    columns: tuple[str, ...] = ()
    needs_weights = False
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
