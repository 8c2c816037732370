"""Llama and what shares its code (SmolLM2, TinyLlama ...): rotary positions, grouped queries."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ctxprune.pruner.families import Family


def _attentions(model: PreTrainedModel) -> list[Any]:
    inner: Any = model.model
    return [layer.self_attn for layer in inner.layers]


FAMILY = Family(
    attentions=_attentions,
    lora_targets=(
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
)
