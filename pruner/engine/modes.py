"""What attention does in a forward pass: one of three modes, which travels with the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ctxprune.pruner.engine.soft import SoftAttention
from ctxprune.pruner.policies import Policy

if TYPE_CHECKING:
    from ctxprune.pruner.engine.cache import PrunedCache
    from ctxprune.pruner.gate import Gate


@dataclass(frozen=True)
class Off:
    """The model runs its own dense attention."""


@dataclass(frozen=True)
class Evict:
    """Rows leave when the policy says so.

    Attributes:
        policy: decides. dial: what was asked for, in words; a cache goes on with the same alone.
    """

    policy: Policy
    dial: str = ""


Mode = Off | Evict | SoftAttention


@dataclass(frozen=True)
class Turn:
    """What the attention function of a layer is told beside query, key and value.

    Attributes:
        mode, gates: of the model. cache: of the forward pass, where rows leave.
        layer, hidden: of the layer whose turn it is; (b, n, hidden_size), the attention's input.
        scored: the caller brought no cache, so this pass is a whole text.
    """

    mode: Mode
    gates: Sequence[Gate]
    cache: PrunedCache | None = None
    layer: int = -1
    hidden: Tensor | None = None
    scored: bool = False

    def at(self, layer: int, hidden: Tensor) -> Turn:
        """The turn of a layer."""
        return replace(self, layer=layer, hidden=hidden)
