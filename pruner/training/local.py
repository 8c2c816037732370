"""The local phase of tuning: each gate learns alone, against the dense output of its own layer.

The model runs dense and without gradient. Beside it every layer attends once more with the soft
decisions of its gate, and the difference that this would make to the residual stream is the layer's
error. No gradient passes from one layer to another, so a step costs a forward pass and the gates'
own attention, and every pair of every layer has a say in it from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ctxprune.pruner.engine.dense import dense_attention
from ctxprune.pruner.engine.soft import SoftAttention, soft_attend
from ctxprune.pruner.families import family_of
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
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        """Note the residual stream of a model's blocks, whose forward pass has no gradient here."""
        blocks = family_of(model.config).blocks(model)

        def note(layer: int, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            self._residual[layer] = args[0] if args else options["hidden_states"]

        with ExitStack() as stack, torch.no_grad():
            for layer, block in enumerate(blocks):
                hook = block.register_forward_pre_hook(partial(note, layer), with_kwargs=True)
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
        scale: float,
    ) -> Tensor:
        """Dense attention (b, h, n, d); its error under the gate goes to `errors`."""
        dense, _ = dense_attention(module, query, key, value, None, scaling=scale)
        output = module.get_submodule(family_of(module.config).output)
        frozen = {name: weight.detach() for name, weight in output.named_parameters()}
        dtype = gate.slope.dtype
        size = self._residual.pop(layer).to(dtype).square().sum(dim=-1)
        with torch.enable_grad():
            soft = soft_attend(self, gate, layer, query, key, value, hidden, scale=scale)
            pair = torch.stack([soft.transpose(1, 2), dense]).flatten(3)
            softly, densely = functional_call(output, frozen, (pair,)).to(dtype)
            self.errors[layer] = ((softly - densely).square().sum(dim=-1) / size).mean()
        return dense.transpose(1, 2)
