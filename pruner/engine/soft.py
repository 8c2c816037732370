"""Attention as training sees it: every pair, with decisions that are soft.

It runs in chunks of queries, forwards and backwards, over the tokens before each chunk alone: no
n x n tensor lives, and half of the pairs is never computed. The gate's own code decides here as it
does at inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.gate import (
    Gate,
    free_pairs,
    log_survival,
    log_used,
    margin,
    no_autocast,
    value_size,
)
from ctxprune.pruner.rows import window_of

# Queries a chunk: enough for full speed of the products, few enough to stay in the cache.
CHUNK = 128


@dataclass(frozen=True)
class Level:
    """A threshold of the gates: log of the prior's window, and a shift of all scores."""

    log_window: float
    shift: float = 0.0


def prior(sparsity: float, context: int) -> float:
    """log w of the window that has this sparsity at this context (see `gate.Gate`)."""
    return math.log(max(window_of(sparsity, context), 1.0))


@dataclass
class SoftAttention:
    """How the training path decides, and what it saw, layer by layer.

    Attributes:
        level: the gates' setting. config: the model's.
        sharpness, alpha: see `TuneConfig`; ignored where hard.
        hard: decide by the sign of the score.
        kept: share of the pairs j < k that survive, one differentiable scalar a layer.
        hard_kept: the same with hard decisions. live: share of the pairs whose decision still
            passes a gradient (0 < p < 1, beyond rounding).
        scores: margin and bonus, what is decided by, (b, n, n) a layer, if asked for.
    """

    level: Level
    config: PruneConfig
    sharpness: float = 1.0
    alpha: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.hard_kept: dict[int, Tensor] = {}
        self.live: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] | None = None

    def attend(
        self,
        module: nn.Module,
        gate: Gate,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        *,
        logits: Logits,
        sight: Sight,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        """What an attention module gives on to its output projection: see `soft_attend`.

        `dense` gives what it does without a gate, (b, n, h, d); it is not asked for here.
        """
        return soft_attend(self, gate, layer, query, key, value, hidden, logits=logits, sight=sight)

    def margins(self, gate: Gate, query: Tensor, key: Tensor, start: int, before: Tensor) -> Tensor:
        """The margins (b, q, r) of a chunk of queries.

        Args:
            query: (b, q, rank) interaction queries from position `start` on.
            key: (b, r, rank) interaction keys of all tokens up to the last of them.
            before: (b, r) the margins as they were before the chunk, +inf for its own tokens.
        """
        rows = torch.arange(key.shape[1], device=key.device)[None]
        queries = rows[:, start:]
        config = self.config
        free = free_pairs(queries, rows, config.protect_first, config.protect_recent)
        scores = gate.scores(query, key, queries, rows, self.level.log_window, self.level.shift)
        return margin(scores, free, before)

    def bonus(
        self,
        product: Tensor,
        margins: Tensor,
        seen: Tensor,
        stale: Tensor,
        received: Tensor,
        size: Tensor,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """What a score has beside its margin, (b, q, r), or 0 where there is no bonus.

        It is the policy's bonus less its mean over the rows of a query: a threshold, other than a
        rank, has to know what is usual. What a row receives within the chunk depends on the
        decisions there, and they on it: it is taken under the bonus from before the chunk.

        Args:
            product: (b, h_kv, groups, q, r) the logits. margins: (b, q, r).
            seen: (q, r), see `_seen`.
            stale: (b, r) the bonus of the query before the chunk, 0 for the chunk's own tokens.
            received: (b, r) attention before the chunk. size: (b, r) the norms of the values.
            sinks: (h_kv, groups, 1, 1), or None.
        """
        if self.config.attention_bonus == 0.0:
            return size.new_zeros(())
        settled = self.log_kept(margins + stale[:, None], seen)
        weights = Logits.softmax(product + settled[:, None, None], sinks)
        total = received[:, None] + weights.mean(dim=(1, 2)).cumsum(dim=1)
        used = log_used(total, size[:, None])
        counted = seen.clone()
        counted[:, : self.config.protect_first] = 0.0
        usual = (used * counted).sum(dim=-1, keepdim=True)
        usual = usual / counted.sum(dim=-1, keepdim=True).clamp_min(1)
        return self.config.attention_bonus * (used - usual)

    def log_kept(self, scores: Tensor, seen: Tensor) -> Tensor:
        """log I of scores (b, q, r), -inf where `seen` (q, r) is 0."""
        if self.hard:
            return torch.zeros_like(scores).masked_fill(scores <= 0, -torch.inf) + seen.log()
        return log_survival(scores * self.sharpness, self.alpha).clamp_min(-1e4) + seen.log()


def soft_attend(
    soft: SoftAttention,
    gate: Gate,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    *,
    logits: Logits,
    sight: Sight,
) -> Tensor:
    """softmax(logits + log I) V for full windows without padding (arXiv 2305.15805, eq. 5).

    Shapes as in `attend`. With `soft.hard`, log I is 0 or -inf; out of sight it is -inf.
    """
    interaction = gate.interact(hidden)
    # What a pass gives hangs on `soft`: were it in the graph, that would be a cycle which Python's
    # collector cannot see, so all nodes of every step would stay.
    settings = replace(soft)
    noting = soft.scores is not None
    out, kept, hard_kept, live, scores = _ChunkedAttention.apply(  # type: ignore[no-untyped-call]
        query,
        key,
        value,
        *interaction,
        gate.slope,
        gate.bias,
        logits.sinks,
        (settings, gate, logits, sight, noting),
    )
    batch, length = hidden.shape[:2]
    pairs = batch * length * (length - 1) / 2
    soft.kept[layer] = kept / pairs
    soft.hard_kept[layer] = hard_kept / pairs
    soft.live[layer] = live / pairs
    if soft.scores is not None:
        soft.scores[layer] = scores
    result: Tensor = out
    return result


class _ChunkedAttention(torch.autograd.Function):
    """Attention and the sum of I over j < k, chunk by chunk.

    It keeps its inputs, its output, and three vectors a chunk: how the tokens before it stood.
    Query heads are folded into the query axis of their key's head: (b, h_kv, groups * q, d).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate_query: Tensor,
        gate_key: Tensor,
        slope: Tensor,
        bias: Tensor,
        sinks: Tensor | None,
        how: tuple[SoftAttention, Gate, Logits, Sight, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        soft, gate, kind, sight, noting = how
        heads = _by_head(sinks, key)
        dtype = _compute_dtype(query)
        q, k, v = _fold(query, key).to(dtype), key.to(dtype), value.to(dtype)
        batch, length = gate_key.shape[:2]
        size = value_size(v.detach().to(bias.dtype))
        before = stale = received = bias.new_empty((batch, 0))
        outs, states, scores = [], [], []
        kept, hard_kept, live = (bias.new_zeros(()) for _ in range(3))
        with no_autocast(query.device):
            for start in range(0, length, CHUNK):
                stop = min(start + CHUNK, length)
                before = _padded(before, stop, torch.inf)
                stale, received = (_padded(known, stop, 0.0) for known in (stale, received))
                states += [before, stale, received]
                seen = _seen(start, stop, bias, sight)
                logits = _product(q[:, :, :, start:stop], k[:, :, :stop], kind, bias)
                least = soft.margins(
                    gate, gate_query[:, start:stop], gate_key[:, :stop], start, before
                )
                bonus = soft.bonus(logits, least, seen, stale, received, size[:, :stop], heads)
                score = least + bonus
                log_kept = soft.log_kept(score, seen)
                survived = log_kept.exp()
                kept = kept + survived.sum() - batch * (stop - start)
                hard_kept = hard_kept + ((score > 0) * seen).sum() - batch * (stop - start)
                live = live + ((survived > 1e-3) & (survived < 1 - 1e-3)).sum()
                weights = kind.softmax(logits.add_(log_kept[:, None, None]), heads)
                outs.append(_times(weights.to(dtype), v[:, :, :stop]))
                if soft.config.attention_bonus > 0.0:
                    received = received + weights.mean(dim=(1, 2)).sum(dim=1)
                    stale = bonus[:, -1]
                before = least[:, -1]
                if noting:
                    if sight.bounds(stop):
                        score = score.masked_fill(seen == 0, -torch.inf)
                    scores.append(_padded(score, length, -torch.inf))
        out = torch.cat(outs, dim=3)
        ctx.save_for_backward(
            query, key, value, gate_query, gate_key, slope, bias, sinks, out, size, *states
        )
        ctx.how = how
        noted = torch.cat(scores, dim=1) if scores else None
        ctx.mark_non_differentiable(hard_kept, live)
        return out.flatten(1, 2).to(query.dtype), kept, hard_kept, live, noted

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor, grad_kept: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        query, key, value, gate_query, gate_key, slope, bias, sinks, out, size, *states = (
            ctx.saved_tensors
        )
        soft, gate, kind, sight, _ = ctx.how
        heads = _by_head(sinks, key)
        dtype = out.dtype
        q, k, v = _fold(query, key).to(dtype), key.to(dtype), value.to(dtype)
        grad_out = _fold(grad_out, key).to(dtype)
        length = gate_key.shape[1]
        wide = bias.dtype
        grads = [torch.zeros_like(t, dtype=wide) for t in (q, k, v, gate_query, gate_key)]
        grad_q, grad_k, grad_v, grad_gate_q, grad_gate_k = grads
        grad_slope, grad_bias = torch.zeros_like(slope), torch.zeros_like(bias)
        grad_sinks = None if heads is None else torch.zeros_like(heads, dtype=wide)
        grad_after: Tensor | None = None
        for index, start in reversed(list(enumerate(range(0, length, CHUNK)))):
            stop = min(start + CHUNK, length)
            part = slice(start, stop)
            seen = _seen(start, stop, bias, sight)
            before, stale, received = states[3 * index : 3 * index + 3]
            logits = _product(q[:, :, :, part], k[:, :, :stop], kind, bias)
            leaves = [
                t.detach().requires_grad_()
                for t in (gate_query[:, part], gate_key[:, :stop], before)
            ]
            with torch.enable_grad():
                least = soft.margins(gate, leaves[0], leaves[1], start, leaves[2])
                bonus = soft.bonus(
                    logits, least.detach(), seen, stale, received, size[:, :stop], heads
                )
                log_kept = soft.log_kept(least + bonus, seen)
                survived = log_kept.exp().sum()
                after = least[:, -1]
            steepness = None if kind.softcap is None else 1 - (logits / kind.softcap).square()
            weights = kind.softmax(logits.add_(log_kept.detach()[:, None, None]), heads)
            upstream = grad_out[:, :, :, part]
            grad_weights = _times(upstream, v[:, :, :stop].transpose(-1, -2)).to(wide)
            mean = (upstream.to(wide) * out[:, :, :, part].to(wide)).sum(-1, keepdim=True)
            grad_logits = grad_weights.sub_(mean).mul_(weights)
            if grad_sinks is not None:
                # What a sink takes has no value, so of its gradient only the mean is left.
                taken = 1 - weights.sum(dim=-1, keepdim=True)
                grad_sinks -= (taken * mean).sum(dim=(0, 3), keepdim=True)[0]
            narrow = (grad_logits if steepness is None else grad_logits * steepness).to(dtype)
            grad_q[:, :, :, part] = _times(narrow, k[:, :, :stop]) * kind.scale
            grad_k[:, :, :stop] += _gather(narrow, q[:, :, :, part]) * kind.scale
            grad_v[:, :, :stop] += _gather(weights.to(dtype), upstream)
            outputs: list[Tensor] = [log_kept, survived]
            given: list[Tensor] = [grad_logits.sum(dim=(1, 2)), grad_kept]
            if grad_after is not None:
                outputs.append(after)
                given.append(grad_after[:, :stop])
            d_query, d_key, d_before, d_slope, d_bias = torch.autograd.grad(
                outputs, [*leaves, slope, bias], given
            )
            grad_gate_q[:, part] = d_query
            grad_gate_k[:, :stop] += d_key
            grad_slope += d_slope
            grad_bias += d_bias
            grad_after = d_before
        return (
            grad_q.flatten(1, 2).to(query.dtype),
            grad_k.to(key.dtype),
            grad_v.to(value.dtype),
            grad_gate_q.to(gate_query.dtype),
            grad_gate_k.to(gate_key.dtype),
            grad_slope,
            grad_bias,
            None if grad_sinks is None else grad_sinks.flatten().to(sinks.dtype),
            None,
        )


def _compute_dtype(query: Tensor) -> torch.dtype:
    """What the products are computed in: under autocast its dtype, else the query's."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _fold(query: Tensor, key: Tensor) -> Tensor:
    """(b, h, n, d) as (b, h_kv, groups, n, d)."""
    folded: Tensor = query.unflatten(1, (key.shape[1], -1))
    return folded


def _by_head(sinks: Tensor | None, key: Tensor) -> Tensor | None:
    """Sinks (h,) as (h_kv, groups, 1, 1)."""
    return None if sinks is None else sinks.detach().view(key.shape[1], -1, 1, 1)


def _seen(start: int, stop: int, like: Tensor, sight: Sight) -> Tensor:
    """(q, r): 1 where row r is in sight of query start + q and not later, else 0."""
    seen = like.new_ones((stop - start, stop))
    seen[:, start:].tril_()
    if sight.bounds(stop):
        place = torch.arange(stop, device=like.device)
        seen *= sight.sees(place[start:, None], place)
    return seen


def _padded(known: Tensor, rows: int, new: float) -> Tensor:
    """(..., rows), with a value for the tokens that are new."""
    return torch.nn.functional.pad(known, (0, rows - known.shape[-1]), value=new)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """(b, h_kv, groups, q, x) @ (b, h_kv, x, y), the groups folded into the queries."""
    product = left.flatten(2, 3) @ right
    unfolded: Tensor = product.unflatten(2, left.shape[2:4])
    return unfolded


def _gather(left: Tensor, right: Tensor) -> Tensor:
    """Sum over groups and queries: (b, h_kv, groups, q, r), (..., q, d) -> (b, h_kv, r, d)."""
    return left.flatten(2, 3).transpose(-1, -2) @ right.flatten(2, 3)


def _product(query: Tensor, key: Tensor, kind: Logits, like: Tensor) -> Tensor:
    """(b, h_kv, groups, q, r) the logits of queries and keys, in the dtype of `like`."""
    return kind.capped(_times(query, key.transpose(-1, -2)).to(like.dtype).mul_(kind.scale))
