"""What a model runs at sparsity 0: its own attention, on a cache that is written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctxprune.pruner.engine.attend import grouped_sdpa


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention; only single queries of grouped heads are folded.

    A group then reads its keys and values once and not once a head, as transformers itself has it
    where there is a mask. Shapes (b, h, n, d) and (b, h_kv, r, d); returns (b, n, h, d).
    """
    if query.shape[2] > 1 or attention_mask is not None or key.shape[1] == query.shape[1]:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return out, None
    return grouped_sdpa(query, key, value, None, scaling).transpose(1, 2), None


class DenseLayer(DynamicLayer):
    """transformers' dynamic layer, but new tokens are written in place instead of into a copy.

    `keys` and `values` are views of larger tensors, which grow by an eighth.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storage: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        key, value = self.storage
        self.storage[0], self.keys = _append(key, self.keys, key_states)
        self.storage[1], self.values = _append(value, self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.storage = [None, None]


class DenseCache(DynamicCache):
    """What a model at sparsity 0 generates with: every token stays, in tensors written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = DenseLayer

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers, slack included."""
        layers = [layer for layer in self.layers if isinstance(layer, DenseLayer)]
        return sum(t.nbytes for layer in layers for t in layer.storage if t is not None)


def _append(storage: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Write `new` (b, heads, n, d) behind `held`; returns the storage, and a view of all tokens."""
    before = held.shape[2] if held.numel() else 0
    total = before + new.shape[2]
    # What was reordered is no longer a view of its storage; and what was made in inference mode
    # cannot be written outside of it.
    if (
        storage is None
        or storage.shape[2] < total
        or storage.data_ptr() != held.data_ptr()
        or (storage.is_inference() and not torch.is_inference_mode_enabled())
    ):
        storage = new.new_empty(*new.shape[:2], total + max(total // 8, 16), new.shape[3])
        if before:
            storage[:, :, :before] = held
    storage[:, :, before:total] = new
    return storage, storage[:, :, :total]
