"""The model that vLLM serves: one of its own, whose attention layers are exchanged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index, init_vllm_registered_model
from vllm.v1.attention.backend import AttentionType

from ctxprune.pruner.checkpoints import checkpoint
from ctxprune.pruner.decoder import Decoder, Layer, decoder_of
from ctxprune.pruner.engine.bounded import Bounded
from ctxprune.pruner.engine.pool import Pool
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.gate import Gate, gate_dtype
from ctxprune.pruner.policies import Policy, Request
from ctxprune.pruner.policies.gate import make
from ctxprune.pruner.vllm.configuration import folder_of, settings_of
from ctxprune.pruner.vllm.layer import PageAttention, exchange
from ctxprune.pruner.vllm.ranks import RankedGatePolicy


class CtxpruneForCausalLM(nn.Module):
    """Any of vLLM's decoders, with attention that evicts.

    Raises:
        CtxpruneError: an attention layer of it is not understood.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config
        own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.hf_text_config.model_type]
        self.inner = init_vllm_registered_model(
            vllm_config, prefix=prefix, hf_config=config.hf_config, architectures=[own]
        )
        decoder, policy = _evicting(config)
        for attention, name, part in list(_attentions(self.inner)):
            layer = next(
                layer
                for layer in decoder.layers
                if layer.index == extract_layer_index(part.layer_name)
            )
            pool = _pool(part, layer, policy, decoder.width, config.max_model_len)
            heads = part.num_heads, part.num_kv_heads
            exchange(attention, name, PageAttention(pool, heads, part.head_size, part.layer_name))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """As of vLLM's model."""
        embedded: Tensor = self.inner.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """As of vLLM's model."""
        hidden: Tensor = self.inner(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """As of vLLM's model."""
        logits: Tensor | None = self.inner.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As of vLLM's model; gates are no weights of it."""
        return {f"inner.{name}" for name in self.inner.load_weights(weights)}


def _evicting(model_config: Any) -> tuple[Decoder, Policy]:
    """The layers of a model and who decides what leaves them, by its folder and the settings."""
    folder = folder_of(model_config)
    settings, config = settings_of(model_config.hf_config), checkpoint.read_config(folder)
    model = checkpoint.sketch(folder)
    gates = checkpoint.load_gates(folder, model, config)
    gates.to(device=torch.get_default_device(), dtype=gate_dtype(model_config.dtype))
    gates.requires_grad_(False)
    request = Request(
        settings.level(config),
        (config.context if settings.context is None else settings.context,),
        config,
        [gate for gate in gates if isinstance(gate, Gate)],
        settings.cap(config),
    )
    policy = make(request)
    ranks = get_tensor_model_parallel_world_size()
    if ranks > 1:
        policy = RankedGatePolicy(policy, tensor_model_parallel_all_reduce, ranks)
    return decoder_of(model), policy


def _attentions(model: nn.Module) -> Iterable[tuple[nn.Module, str, Any]]:
    """Modules of a model that have an attention layer of vLLM's, its name there, and the layer."""
    for module in model.modules():
        for name, part in module.named_children():
            if isinstance(part, Attention):
                yield module, name, part


def _pool(part: Any, layer: Layer, policy: Policy, width: int, longest: int) -> Pool:
    """The pages of a layer that takes the place of one of vLLM's.

    Raises:
        CtxpruneError: that one attends in a way that pages do not know.
    """
    unknown = {
        "is no decoder": part.attn_type != AttentionType.DECODER,
        "shares the keys of another layer": part.kv_sharing_target_layer_name is not None,
        "has sinks without a row": part.has_sink,
        "has slopes by distance": getattr(part.impl, "alibi_slopes", None) is not None,
        f"sees {part.sliding_window} tokens, not {layer.sight.size}": (
            part.sliding_window != layer.sight.size or layer.sight.chunked
        ),
    }
    for what, found in unknown.items():
        if found:
            raise CtxpruneError(f"the layer `{part.layer_name}` of vLLM {what}")
    owner, place = (Bounded(layer.sight), 0) if layer.gate is None else (policy, layer.gate)
    # vLLM says 0 where there is no cap.
    logits = Logits(part.impl.scale, getattr(part.impl, "logits_soft_cap", None) or None)
    like = tuple(
        torch.zeros(1, heads, 1, size, dtype=part.dtype)
        for heads, size in (
            (part.num_heads, part.head_size),
            (part.num_kv_heads, part.head_size),
            (part.num_kv_heads, part.head_size_v),
        )
    )
    return Pool(owner, place, layer.sight, logits, like, width, longest)  # type: ignore[arg-type]
