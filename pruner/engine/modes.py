"""What attention does in a forward pass: one of three modes, which travels with the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ctxprune.pruner.engine.soft import SoftAttention
from ctxprune.pruner.policies import Policy

if TYPE_CHECKING:
    from ctxprune.pruner.decoder import Layer
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
        mode, gates, layers: of the model. cache: of the forward pass, where rows leave.
        number, hidden: of the layer whose turn it is, among `layers`; (b, n, hidden_size), the
            attention's input. None: of no layer of the decoder.
        scored: the caller brought no cache, so this pass is a whole text.
        root: the module whose call began the pass.
        masks: of this pass, that were looked at and hide what they should.
    """

    mode: Mode
    gates: Sequence[Gate]
    layers: Sequence[Layer]
    cache: PrunedCache | None = None
    number: int | None = None
    hidden: Tensor | None = None
    scored: bool = False
    root: nn.Module | None = None
    masks: list[Tensor] = field(default_factory=list)

    def at(self, number: int, hidden: Tensor) -> Turn:
        """The turn of a layer."""
        return replace(self, number=number, hidden=hidden)
