"""Attention weights of a block of queries whose own rows stand behind all others.

Query heads are folded into the query axis of their key head: (b, h_kv, groups * q, ...).
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def causal_each(query: Tensor, key: Tensor, before: Tensor) -> Tensor:
    """The same (b, 1, groups * q, r) where each sequence has its own number `before` (b, 1)."""
    own = before + torch.arange(query.shape[2], device=key.device)
    later = torch.arange(key.shape[2], device=key.device) > own[..., None]
    mask = query.new_zeros(later.shape).masked_fill_(later, -torch.inf)
    groups = query.shape[1] // key.shape[1]
    return mask.repeat(1, groups, 1)[:, None]


def softmax_weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(Q K^T scale + mask), (b, h_kv, groups * q, r), float32 or wider.

    Args:
        mask: as `causal` and `causal_each` give it.
    """
    batch, key_heads, rows, width = key.shape
    # One mask for all is not repeated.
    mask = mask[0] if len(mask) == 1 else mask.expand(-1, key_heads, -1, -1).flatten(0, 1)
    folded = query.reshape(batch * key_heads, -1, width)
    logits = torch.baddbmm(mask, folded, key.flatten(0, 1).transpose(1, 2), alpha=scale)
    wide = torch.promote_types(key.dtype, torch.float32)
    return logits.softmax(dim=-1, dtype=wide).view(batch, key_heads, -1, rows)
