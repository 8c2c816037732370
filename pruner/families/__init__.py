"""Model families: where a model keeps its attention modules. One file each, named as its
`config.model_type`; a new family is one new file that exports `FAMILY`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ctxprune.pruner.errors import CtxpruneError


@dataclass(frozen=True)
class Family:
    """What differs between architectures.

    Attributes:
        blocks: the decoder blocks of a model, in order; their input is the residual stream.
        attention: the name of a block's attention module, which takes `hidden_states` and
            `past_key_values`, and calls the registered attention function.
        output: the name of an attention module's output projection.
        lora_targets: names of the projections that LoRA adapts.
        bounded: positions are learned, so `max_position_embeddings` is a hard limit.
    """

    blocks: Callable[[PreTrainedModel], list[nn.Module]]
    attention: str
    output: str
    lora_targets: tuple[str, ...]
    bounded: bool = False

    def attentions(self, model: PreTrainedModel) -> list[nn.Module]:
        """The attention modules of a model, in layer order."""
        return [block.get_submodule(self.attention) for block in self.blocks(model)]


def names() -> list[str]:
    """The `model_type`s that are supported, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model's configuration.

    Raises:
        CtxpruneError: the architecture is not supported, or is an encoder.
    """
    if config.model_type not in names():
        listed = ", ".join(f"`{name}`" for name in names())
        raise CtxpruneError(
            f"model type `{config.model_type}` is not supported",
            f"supported families are {listed}; docs/how/architecture.md tells how to add one",
        )
    module = importlib.import_module(f"{__name__}.{config.model_type}")
    family: Family = module.FAMILY
    return family
