"""GPT-2: learned positions, one fused projection."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ctxprune.pruner.families import Family


def _attentions(model: PreTrainedModel) -> list[Any]:
    inner: Any = model.transformer
    return [block.attn for block in inner.h]


FAMILY = Family(
    attentions=_attentions,
    lora_targets=("c_attn", "c_proj", "c_fc"),
    bounded=True,
)
