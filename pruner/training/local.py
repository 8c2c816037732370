"""The local phase of tuning: each gate learns alone, against the dense output of its own layer.

The model runs dense and without gradient. Beside it every layer attends once more with the soft
decisions of its gate, and the difference that this would make to the residual stream is the layer's
error. No gradient passes from one layer to another, so a step costs a forward pass and the gates'
own attention, and every pair of every layer has a say in it from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ctxprune.pruner.decoder import Decoder, Sight, output_of
from ctxprune.pruner.engine.soft import SoftAttention, soft_attend
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.gate import Gate


@dataclass
class LocalAttention(SoftAttention):
    """Dense attention that notes what soft decisions would have changed.

    Attributes:
        errors: |W_o (a - d)|^2 / |x|^2 of a layer, the mean over its tokens, differentiable by its
            gate alone: a and d are the soft and the dense attention, W_o is the projection of their
            heads, x the residual stream that it is added to.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.errors: dict[int, Tensor] = {}
        self._residual: dict[int, Tensor] = {}

    @contextmanager
    def watch(self, decoder: Decoder) -> Iterator[None]:
        """Note the residual stream of blocks with a gate; a forward pass has no gradient here."""

        def note(layer: int, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            self._residual[layer] = args[0] if args else options["hidden_states"]

        with ExitStack() as stack, torch.no_grad():
            for number, layer in enumerate(decoder.gated):
                noting = partial(note, number)
                hook = layer.block.register_forward_pre_hook(noting, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def attend(
        self,
        module: Any,
        gate: Gate,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        *,
        logits: Logits,
        sight: Sight,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        """Dense attention (b, h, n, d); its error under the gate goes to `errors`."""
        exact = dense()
        output = output_of(module)
        trained = (each for each in output.named_parameters() if each[1].requires_grad)
        frozen = {name: weight.detach() for name, weight in trained}
        dtype = gate.slope.dtype
        size = self._residual.pop(layer).to(dtype).square().sum(dim=-1)
        with torch.enable_grad():
            soft = soft_attend(
                self, gate, layer, query, key, value, hidden, logits=logits, sight=sight
            )
            # One batch: a product of eight-bit weights has no gradient in four dimensions.
            pair = torch.cat([soft.transpose(1, 2), exact]).flatten(2)
            softly, densely = functional_call(output, frozen, (pair,)).to(dtype).chunk(2)
            self.errors[layer] = ((softly - densely).square().sum(dim=-1) / size).mean()
        return exact.transpose(1, 2)
