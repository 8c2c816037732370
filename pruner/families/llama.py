"""Llama and what shares its code (SmolLM2, TinyLlama ...): rotary positions, grouped queries."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ctxprune.pruner.families import Family


def _blocks(model: PreTrainedModel) -> list[Any]:
    inner: Any = model.model
    return list(inner.layers)


FAMILY = Family(
    blocks=_blocks,
    attention="self_attn",
    output="o_proj",
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
