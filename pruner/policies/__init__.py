"""Eviction policies: one file each, found by its name.

A policy file defines `def make(request: Request) -> Policy`. It answers one question, which rows
a block of queries keeps, and says with `notes` what it has to store in a row for that. It never
touches the table: `attend` evicts.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.errors import choose
from ctxprune.pruner.gate import Gate
from ctxprune.pruner.table import Table


@dataclass(frozen=True)
class Request:
    """What a policy is made from.

    Attributes:
        sparsity: share of the earlier tokens to drop, in (0, 1).
        context: length of the texts to come, or None where it is unknown: a policy with a budget
            then keeps its share of the tokens seen so far, at every moment.
        config: of the model; gates: one a layer.
    """

    sparsity: float
    context: int | None
    config: PruneConfig
    gates: Sequence[Gate]


@dataclass(frozen=True)
class Block:
    """A block of consecutive queries.

    Attributes:
        position: (b, q) int64 from the first token of each sequence; -1 for padding.
        notes: what `Policy.annotate` gave for these tokens, (b, q, width) each.
    """

    position: Tensor
    notes: dict[str, Tensor]


class Policy(Protocol):
    """Decides which rows stay."""

    columns: tuple[str, ...]  # the notes that each row of the table has to carry

    def annotate(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Per-token features (b, n, width) of the attention's input hidden (b, n, hidden_size)."""

    def keep(self, layer: int, table: Table, block: Block) -> Tensor:
        """(b, q, r) bool, True = query k would keep row j.

        `attend` combines the answers along the queries, so that what is dropped stays dropped,
        and sees to causality and padding.
        """


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
