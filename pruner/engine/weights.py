"""Attention weights of a block of queries whose own rows stand behind all others.

Query heads are folded into the query axis of their key head: (b, h_kv, groups * q, ...).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logits:
    """How weights come of products of queries and keys.

    Attributes:
        scale: of the products. softcap: logits are softcap * tanh(logits / softcap).
        sinks: (h,) one more logit for each head, which takes its share of the weights and has no
            row.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether they are products, scaled, and no more: what fused kernels compute."""
        return self.softcap is None and self.sinks is None

    def capped(self, logits: Tensor) -> Tensor:
        """Logits of any shape under the cap."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    @staticmethod
    def softmax(logits: Tensor, sinks: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """Weights over the last axis; what a sink takes is missing from their sum.

        Args:
            logits: capped and masked. sinks: of a shape that broadcasts to (..., 1), or None.
        """
        weights = logits.softmax(dim=-1, dtype=dtype)
        if sinks is None:
            return weights
        total = logits.to(weights.dtype).logsumexp(dim=-1, keepdim=True)
        return weights * (total - sinks.to(weights.dtype)).sigmoid()


def causal(query: Tensor, key: Tensor, before: int, hidden: Tensor | None = None) -> Tensor:
    """What to add to logits: -inf for rows later than a query, and for hidden ones, else 0.

    Args:
        query: (b, h, q, d). key: (b, h_kv, r, d). before: rows before the first query's own one.
        hidden: (b, r), True where no query sees a row; None: nowhere.

    Returns:
        (1, 1, groups * q, r), or (b, 1, groups * q, r) where it differs between sequences.
    """
    groups, queries = query.shape[1] // key.shape[1], query.shape[2]
    later = query.new_full((groups, queries, key.shape[2]), -torch.inf).triu_(before + 1)
    mask = later.view(1, 1, groups * queries, -1)
    return mask if hidden is None else mask.masked_fill(hidden[:, None, None], -torch.inf)


def earlier(query: Tensor, key: Tensor, before: int | Tensor) -> Tensor:
    """(1 or b, q, r) bool: rows not later than a query; `before` is a number or (b, 1)."""
    own = before + torch.arange(query.shape[2], device=key.device)[None]
    return torch.arange(key.shape[2], device=key.device) <= own[..., None]


def hiding(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """What to add to logits, (1 or b, 1, groups * q, r): -inf where not visible (1 or b, q, r)."""
    mask = query.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    return mask.repeat(1, query.shape[1] // key.shape[1], 1)[:, None]


def weighted(weights: Tensor, value: Tensor, query: Tensor) -> Tensor:
    """The sum of values (b, h_kv, r, d) by weights (b, h_kv, groups * q, r), as (b, h, q, d)."""
    return (weights.to(value.dtype) @ value).view(*query.shape[:-1], value.shape[-1])


def softmax_weights(query: Tensor, key: Tensor, mask: Tensor | None, logits: Logits) -> Tensor:
    """The weights (b, h_kv, groups * q, r), float32 or wider, of products and a mask to add.

    Args:
        mask: as `causal` and `hiding` give it, or None: all see all.
    """
    batch, key_heads, rows, width = key.shape
    folded = query.reshape(batch * key_heads, -1, width)
    columns = key.flatten(0, 1).transpose(1, 2)
    if mask is not None:
        # One mask for all is not repeated.
        mask = mask[0] if len(mask) == 1 else mask.expand(-1, key_heads, -1, -1).flatten(0, 1)
    if mask is None or logits.softcap is not None:
        product = logits.capped(folded @ columns * logits.scale)
        product = product if mask is None else product + mask
    else:
        product = torch.baddbmm(mask, folded, columns, alpha=logits.scale)
    sinks = logits.sinks
    if sinks is not None:
        each = folded.shape[1] * key_heads // len(sinks)
        sinks = sinks.repeat_interleave(each).view(1, key_heads, -1, 1)
    wide = torch.promote_types(key.dtype, torch.float32)
    return logits.softmax(product.view(batch, key_heads, -1, rows), sinks, wide)
