"""What a cache will take for a text of some length, without weights and without reading a text.

The pages are made as a forward pass would make them, of tensors that have shapes and no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import Handle
from ctxprune.pruner.engine.modes import Evict
from ctxprune.pruner.engine.page import New
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.savings import Savings


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer.

    Attributes:
        queries, keys: how many. size, value: width of a key, and of a value.
        latents: widths of what a page keeps in their place, for all heads together; or None.
    """

    queries: int
    keys: int
    size: int
    value: int
    latents: tuple[int, int] | None = None

    def __str__(self) -> str:
        """In words."""
        widths = f"{self.size}" if self.size == self.value else f"{self.size} and {self.value}"
        said = f"{self.queries} of queries, {self.keys} of keys, of width {widths}"
        if self.latents is None:
            return said
        return f"{said}; kept as latents of {self.latents[0]} and {self.latents[1]}"

    def news(self, dtype: torch.dtype) -> New:
        """What one token writes, without data."""
        kept = [(self.keys, self.size), (self.keys, self.value)]
        if self.latents is not None:
            kept = [(1, width) for width in self.latents]
        query, key, value = (
            torch.empty(1, count, 1, width, dtype=dtype, device="meta")
            for count, width in [(self.queries, self.size), *kept]
        )
        return New(key, value, query, None)


def heads_of(attention: Any, config: Any) -> Heads:
    """The heads of an attention module, as it or its configuration names them.

    Raises:
        CtxpruneError: they are not named.
    """
    queries = getattr(config, "num_attention_heads", None)
    if queries is None:
        raise CtxpruneError(f"`{type(attention).__name__}` does not say how many heads it has")
    latent = getattr(attention, "qk_head_dim", None)
    if latent is not None:
        kept = None
        if hasattr(attention, "expand_kv"):
            kept = attention.kv_lora_rank, attention.qk_rope_head_dim
        return Heads(queries, queries, latent, getattr(attention, "v_head_dim", latent), kept)
    size = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    size = size or config.hidden_size // queries
    projection = getattr(attention, "k_proj", None)
    if isinstance(projection, nn.Linear):
        keys = projection.out_features // size
    else:
        keys = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, keys, size, size)


def footprints(handle: Handle, lengths: Sequence[int], dtype: torch.dtype) -> dict[int, Savings]:
    """What a cache holds after one text of each length, at what the handle is set to.

    Args:
        handle: of a model on the device `meta`, set to evict. dtype: of the cache.

    Raises:
        CtxpruneError: the heads of a layer are not known.
    """
    decoder = handle.decoder
    news = []
    for layer in decoder.layers:
        new = heads_of(layer.attention, decoder.config).news(dtype)
        hidden = torch.empty(1, 1, decoder.width, dtype=dtype, device="meta")
        news.append((new, hidden))
    found = {}
    for tokens in lengths:
        mode = handle.at(tokens, tokens)
        assert isinstance(mode, Evict)
        cache = PrunedCache(mode.policy, decoder)
        cache.reserve(tokens, news)
        found[tokens] = cache.savings
    return found
