"""Eviction policies: one file each, found by its name. `make(request)` of that file builds it.

A policy answers one question, `score`: which rows matter least? It is asked at eviction steps, with
the queries since the last one; what it has to remember of a row it keeps in columns of the page.
Everything counts in positions, so that one pass, single tokens and any batch decide alike.

Axes: s sequences that reached their step, q queries since the last one, r rows, n tokens.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ctxprune.pruner import rows
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.errors import choose
from ctxprune.pruner.gate import Gate
from ctxprune.pruner.rows import Rows


@dataclass(frozen=True)
class Request:
    """What a policy is made from.

    Attributes:
        sparsity: share of the earlier tokens to drop, in [0, 1).
        contexts: lengths of the texts to come, one a sequence, or one for any batch.
        config: of the model; gates: one a layer.
        max_rows: cap on the rows of a layer, or None.
        prompts: tokens of each text (or of any) read before rows leave; 0: they leave at once.
    """

    sparsity: float
    contexts: tuple[int, ...]
    config: PruneConfig
    gates: Sequence[Gate]
    max_rows: int | None = None
    prompts: tuple[int, ...] = (0,)

    def even_rows(self, least: int = 1, longest: int = rows.LONGEST) -> Rows:
        """The same number of rows in every layer; `least` of them are never refused."""
        return self.rows([(1.0,) * len(self.gates)] * len(self.contexts), least, longest)

    def rows(
        self, shares: Sequence[tuple[float, ...]], least: int, longest: int = rows.LONGEST
    ) -> Rows:
        """Rows in these proportions between the layers, for each of the contexts.

        Args:
            least: rows that are never refused. longest: tokens between two eviction steps at most.
        """
        if self.sparsity == 0.0:
            plans = [rows.unlimited(len(self.gates))]
        else:
            pairs = zip(self.contexts, shares, strict=True)
            plans = [rows.plan(self.sparsity, n, share, least, longest) for n, share in pairs]
        return Rows(plans, self.max_rows, self.prompts)


class Policy:
    """Decides which rows stay. This one keeps all; a policy overrides what it needs.

    Attributes:
        columns: name -> width of what it keeps of each row: a number (1), or a vector.
        fresh: what columns of one number hold of a row that no step has seen yet.
        watches: it asks for attention weights, so the queries wait until the next step.
        rows: that each sequence may hold; None: all, so it is never asked.
    """

    columns: Mapping[str, int] = {}
    fresh: Mapping[str, float] = {}
    watches = False
    rows: Rows | None = None

    def annotate(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Features (b, n, width) of the attention's input (b, n, hidden_size), or None.

        They wait beside the queries until the next eviction step.
        """
        return None

    def remember(self, layer: int, held: Held, queries: Queries) -> None:
        """Write what it keeps of new rows for ever into their columns; those in `fresh` are set."""

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """(s, r) floats: the least leave first; +inf protects. Free slots may have any score."""
        return held.position.double()


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
