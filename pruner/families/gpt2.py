"""GPT-2: learned positions, one fused projection."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ctxprune.pruner.families import Family


def _blocks(model: PreTrainedModel) -> list[Any]:
    inner: Any = model.transformer
    return list(inner.h)


FAMILY = Family(
    blocks=_blocks,
    attention="attn",
    output="c_proj",
    lora_targets=("c_attn", "c_proj", "c_fc"),
    bounded=True,
)
