"""Any decoder, derived from the model: its layers, what they may see, what can be adapted.

Everything is read off what transformers declares of a model: `_can_record_outputs` names the
classes of blocks and of attention modules, `layer_idx` their place in the cache, and the layer
types of the configuration what each may see. What is not declared is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from ctxprune.pruner.errors import CtxpruneError

# Layers without keys, which some models declare among those with attention.
STATES = ("linear_attention", "conv", "mamba", "moe", "mlp")
# What bounds a layer, by its type; a layer of any other type is refused.
BOUNDS = {
    "full_attention": None,
    "attention": None,
    "hybrid": None,
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
# Names of output projections, the first that an attention module has.
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo")
# A projection from or to fewer features routes or scales: LoRA leaves it alone.
LEAST = 8


@dataclass(frozen=True)
class Sight:
    """What a query of a layer may see at all, the gate and the policy apart.

    A token that is out of sight stays so, for all later queries.

    Attributes:
        size: the newest tokens, the query's own among them; None: all.
        chunked: of those, the ones in the query's own chunk: the text is cut every `size` tokens.
    """

    size: int | None = None
    chunked: bool = False

    def bounds(self, tokens: int) -> bool:
        """Whether some of so many tokens are out of sight for the last one."""
        return self.size is not None and tokens > self.size

    def sees(self, query: Tensor, row: Tensor) -> Tensor:
        """bool, of positions (int64) that broadcast, rows not later than queries; of a size."""
        assert self.size is not None
        if self.chunked:
            return row // self.size == query // self.size
        return query - row < self.size

    def held(self, seen: int) -> int:
        """How many of `seen` tokens the next query may still see."""
        if self.size is None:
            return seen
        return seen % self.size if self.chunked else min(seen, self.size - 1)

    def until(self, position: Tensor) -> Tensor:
        """The first position (int64) that does not see a token at these; of a size."""
        assert self.size is not None
        if self.chunked:
            return (position // self.size + 1) * self.size
        return position + self.size

    def kept(self, tokens: int) -> float:
        """Share of the pairs j < k of a text whose token j is in sight of query k."""
        if not self.bounds(tokens):
            return 1.0
        return sum(map(self.held, range(tokens))) / (tokens * (tokens - 1) / 2)


@dataclass(frozen=True)
class Layer:
    """An attention layer.

    Attributes:
        index: its place in the cache. block: takes the residual stream. attention: its module.
        sight: what it may see at all.
        gate: the number of its gate; None: it is left with the window that it has.
    """

    index: int
    block: nn.Module
    attention: nn.Module
    sight: Sight
    gate: int | None


@dataclass(frozen=True)
class Decoder:
    """What is derived from a model.

    Attributes:
        module: the decoder; its configuration is `config`. layers: with attention, in order.
        width: of the residual stream. positions: that are learned, a hard limit; None: any number.
        lora_targets: names, in the model, of the projections that LoRA adapts.
    """

    module: nn.Module
    config: PreTrainedConfig
    layers: tuple[Layer, ...]
    width: int
    positions: int | None
    lora_targets: tuple[str, ...]

    @property
    def gated(self) -> tuple[Layer, ...]:
        """The layers with a gate: those that see furthest."""
        return tuple(layer for layer in self.layers if layer.gate is not None)

    @property
    def sight(self) -> Sight:
        """What the layers with a gate may see."""
        return self.gated[0].sight

    def describe(self) -> str:
        """Which layers have a gate, and which are left with their window, in words."""
        left = [layer for layer in self.layers if layer.gate is None]
        said = f"{len(self.gated)} of {len(self.layers)} attention layers have a gate"
        if self.sight.size is not None:
            said += f", within their own {_window(self.sight)}"
        if left:
            windows = " or ".join(sorted({_window(layer.sight) for layer in left}))
            said += f"; {len(left)} are left with their {windows}"
        others = self.config.num_hidden_layers - len(self.layers)
        return said + (f"; {others} layers have no attention" if others > 0 else "")


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Derive the decoder of a model.

    Raises:
        CtxpruneError: it is no decoder whose attention can be exchanged, or is not understood.
    """
    config = model.config.get_text_config(decoder=True)
    if not getattr(config, "is_causal", True):
        raise refusal(config, "its attention is not causal")
    module = _decoder(model, config)
    blocks, attentions = (_declared(module, name) for name in ("hidden_states", "attentions"))
    kinds = _layer_types(config)
    found: list[tuple[int, nn.Module, nn.Module, Sight]] = []
    for block in module.modules():
        if not isinstance(block, blocks):
            continue
        inside = [part for part in block.modules() if isinstance(part, attentions)]
        if len(inside) > 1:
            raise refusal(config, "a block of it has several attention modules")
        for attention in inside:
            index = getattr(attention, "layer_idx", None)
            index = len(found) if index is None else index
            if kinds[index : index + 1] and kinds[index] in STATES:
                continue
            if index >= len(kinds) or kinds[index] not in BOUNDS:
                kind = kinds[index] if index < len(kinds) else "unknown"
                raise refusal(config, f"its layer {index} is of type `{kind}`")
            found.append((index, block, attention, _sight(config, index, kinds[index])))
    if not found:
        raise refusal(config, "it has no attention layers")
    if len({index for index, *_ in found}) < len(found):
        raise refusal(config, "several of its layers share a place in the cache")
    sizes = [sight.size for *_, sight in found]
    widest = None if None in sizes else max(size for size in sizes if size is not None)
    layers, gates = [], 0
    for index, block, attention, sight in found:
        gated = sight.size == widest
        layers.append(Layer(index, block, attention, sight, gates if gated else None))
        gates += gated
    return Decoder(
        module,
        config,
        tuple(layers),
        config.hidden_size,
        _positions(model, module, config),
        tuple(_targets(model, [layer.block for layer in layers])),
    )


def output_of(attention: nn.Module) -> nn.Module:
    """The output projection of an attention module.

    Raises:
        CtxpruneError: it has none of a known name.
    """
    for name in OUTPUTS:
        if isinstance(getattr(attention, name, None), nn.Module):
            return attention.get_submodule(name)
    raise CtxpruneError(
        f"`{type(attention).__name__}` has no output projection of a known name",
        "tune without `--local-steps`",
    )


def check_type(config: PreTrainedConfig) -> type:
    """The class of models that has such a configuration, `AutoModelForCausalLM` as a rule.

    Raises:
        CtxpruneError: none that writes text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if config.is_encoder_decoder or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise refusal(config, "it is no decoder alone")
    remote = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise refusal(config, "it is no causal language model")


def refusal(config: PreTrainedConfig, why: str) -> CtxpruneError:
    """The error that says why a model cannot be served."""
    return CtxpruneError(
        f"model type `{config.model_type}` is not supported: {why}",
        "docs/guide/models.md tells what is supported and what is not, and why",
    )


def _decoder(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    """The module of a model that declares blocks and attention and has the text's configuration."""
    for module in (model.get_decoder(), *model.modules()):
        declared = all(_declared(module, name) for name in ("hidden_states", "attentions"))
        if declared and getattr(module, "config", None) is config:
            return module  # type: ignore[no-any-return]
    if getattr(model, "_supports_attention_backend", False):
        raise refusal(config, "it does not declare its blocks and attention modules")
    raise refusal(config, "its attention does not go through transformers' interface")


def _declared(module: nn.Module, name: str) -> tuple[type, ...]:
    """The classes that a module declares for an output of its layers."""
    found: Any = (getattr(module, "_can_record_outputs", None) or {}).get(name, ())
    found = found if isinstance(found, list | tuple) else [found]
    classes = [getattr(entry, "target_class", entry) for entry in found]
    return tuple(entry for entry in classes if isinstance(entry, type))


def _layer_types(config: PreTrainedConfig) -> list[str]:
    own = getattr(config, "layer_types", None)
    return list(get_layer_types_and_kwargs(config)[0] if own is None else own)


def _sight(config: PreTrainedConfig, index: int, kind: str) -> Sight:
    name = BOUNDS[kind]
    if name is None:
        return Sight()
    return Sight(getattr(config.per_layer_config[index], name, None), name.startswith("attention"))


def _positions(model: PreTrainedModel, module: nn.Module, config: PreTrainedConfig) -> int | None:
    """The learned positions: an embedding beside that of the words, of about their number."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    learned = limit is not None and any(
        isinstance(part, nn.Embedding)
        and part is not words
        and limit <= part.num_embeddings <= limit + 2
        for part in module.modules()
    )
    return limit if learned else None


def _targets(model: PreTrainedModel, blocks: list[nn.Module]) -> Iterator[str]:
    """Names of the projections in blocks with attention, states of Mamba and its like apart."""
    inside = {part for block in blocks for part in _projections(block)}
    for name, part in model.named_modules():
        if part in inside:
            yield name


def _projections(block: nn.Module) -> Iterator[nn.Module]:
    for parent in block.modules():
        parts = list(parent.children())
        if any(isinstance(part, nn.Conv1d) for part in parts):
            continue
        for part in parts:
            if type(part) in (nn.Linear, Conv1D):
                weight = part.weight
                assert isinstance(weight, torch.Tensor)
                if min(weight.shape) >= LEAST:
                    yield part


def _window(sight: Sight) -> str:
    return f"{'chunks' if sight.chunked else 'window'} of {sight.size} tokens"
