"""The gate: which earlier tokens a query keeps. Pure functions of tensors, and their parameters.

Axes: b batch, q queries, r rows (tokens that may be dropped), n tokens, h heads, d head_dim.
Scores are `(b, q, r)`: entry [k, j] is what query k thinks of token j; above 0 keeps it. A token
once dropped stays dropped. Equations: "Dynamic Context Pruning", arXiv 2305.15805, section 3;
docs/how/method.md says where we depart from them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _AlphaSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float) -> Tensor:
        if alpha == 1.5:
            inner = scores.clamp(-2.0, 2.0)
            kept = ((inner + (8.0 - inner * inner).sqrt()) / 4.0) ** 2
            # At the ends the closed form is 1 and 0 only up to rounding.
            kept = torch.where(scores <= -2.0, 0.0, torch.where(scores >= 2.0, 1.0, kept))
        elif alpha == 2.0:
            kept = ((scores + 1.0) / 2.0).clamp(0.0, 1.0)
        else:
            kept = _bisect(scores, alpha)
        ctx.save_for_backward(kept)
        ctx.alpha = alpha
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        u, v = kept ** (2.0 - ctx.alpha), (1.0 - kept) ** (2.0 - ctx.alpha)
        slope = torch.where((kept > 0.0) & (kept < 1.0), u * v / (u + v), torch.zeros_like(kept))
        return grad * slope, None


def _bisect(scores: Tensor, alpha: float) -> Tensor:
    """Solve p^(a-1) - (1-p)^(a-1) = (a-1) s for p in [0, 1]; the left side rises with p."""
    power, target = alpha - 1.0, (alpha - 1.0) * scores
    low, high = torch.zeros_like(scores), torch.ones_like(scores)
    for _ in range(53 if scores.dtype == torch.float64 else 30):
        middle = (low + high) / 2.0
        below = middle**power - (1.0 - middle) ** power < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    kept = (low + high) / 2.0
    return torch.where(target >= 1.0, 1.0, torch.where(target <= -1.0, 0.0, kept))


def alpha_sigmoid(scores: Tensor, alpha: float) -> Tensor:
    """First component of alpha-entmax([s, 0]), any shape, values in [0, 1].

    alpha = 1 is the sigmoid; as alpha grows it becomes the step function s > 0. For alpha > 1 it
    is exactly 0 or 1, with no gradient, outside |s| < 1 / (alpha - 1).
    """
    # Near 1 the general equation is 0 = 0 up to rounding; the sigmoid is its limit.
    if alpha < 1.0 + 1e-4:
        return torch.sigmoid(scores)
    kept: Tensor = _AlphaSigmoid.apply(scores, alpha)  # type: ignore[no-untyped-call]
    return kept


def margin(scores: Tensor, free: Tensor, before: Tensor | None = None) -> Tensor:
    """m[k, j] = min over queries i in (j, k] of s[i, j]: how little token j ever was worth.

    Args:
        scores: (b, q, r), of consecutive queries.
        free: bool, broadcastable to scores; True where query i may drop token j. False elsewhere,
            and wherever i <= j.
        before: (b, r), the margins up to the query before them; None: these are the first.

    Returns:
        (b, q, r), falling along the queries; +inf where nothing could drop the token yet, so also
        above the diagonal.
    """
    scores = torch.where(free, scores, torch.inf)
    if before is None:
        return scores.cummin(dim=-2).values
    return torch.cat([before[:, None], scores], dim=-2).cummin(dim=-2).values[:, 1:]


def log_survival(margins: Tensor, alpha: float = 1.0) -> Tensor:
    """log I = log alpha_sigmoid(m), <= 0, of margins already multiplied by the sharpness.

    It stands for the paper's product over queries of p[i, j]: with hard decisions both are the
    sign of the margin, but a product of many probabilities just below 1 forgets what every one of
    its factors keeps (docs/how/method.md, departure 3).
    """
    if alpha < 1.0 + 1e-4:
        return F.logsigmoid(margins)
    tiny = torch.finfo(margins.dtype).tiny
    return alpha_sigmoid(margins, alpha).clamp_min(tiny).log()


def value_size(value: Tensor) -> Tensor:
    """(b, r) the Euclidean norm of values (b, h_kv, r, d), the mean over their heads."""
    size: Tensor = value.norm(dim=-1).mean(dim=1)
    return size


def log_used(received: Tensor, size: Tensor) -> Tensor:
    """log(attention received * size of the value) of tensors that broadcast; finite at 0."""
    used = received * size
    return used.clamp_min(torch.finfo(used.dtype).tiny).log()


def free_pairs(
    query_position: Tensor, row_position: Tensor, protect_first: int, protect_recent: int
) -> Tensor:
    """True where a query may drop a token: neither a sink, nor recent, nor itself, nor later.

    query_position (b, q) and row_position (b, r), int64; returns bool (b, q, r).
    """
    age = query_position[..., :, None] - row_position[..., None, :]
    return (age >= max(protect_recent, 1)) & (row_position[..., None, :] >= protect_first)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The gate computes in its own dtype; entering torch's context costs a decode step dear."""
    # What has no data has no such context either.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gates of a model of a dtype compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Gate(nn.Module):
    """The parameters of one attention layer's gate, shared by its heads.

    s[k, j] = q_int[k] . k_int[j] / sqrt(r) + slope * log(w / age) + bias + shift

    with age = k - j, and w the width of the local window that has the requested sparsity at the
    tuned context. The paper's constant beta is thus replaced by a term that makes an untrained
    gate exactly "sinks + window" at any level; what is learned is where to be better than that.
    `W_k` starts at zero, so that the content speaks only once it has learned something, as B does
    in LoRA; `slope` starts at 2: the edge of the soft window is then about as wide as the window.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, rank, bias=False)
        self.key = nn.Linear(hidden_size, rank, bias=False)
        self.slope = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(0.0))
        nn.init.normal_(self.query.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.key.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Move with the model, but stay float32 at least: `.to(bfloat16)` is for its weights."""

        def wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            narrow = torch.promote_types(moved.dtype, torch.float32) != moved.dtype
            return tensor.to(moved.device) if narrow else moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def interact(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Interaction query and key, each (b, n, r), of hidden states (b, n, hidden_size).

        They are computed in the gate's own dtype and rounded to that of the hidden states, in
        which a row's key is kept; training rounds alike, so that it sees the same decisions.
        """
        query, key = self.features(hidden).chunk(2, dim=-1)
        return query, key

    def features(self, hidden: Tensor) -> Tensor:
        """Interaction query and key side by side, (b, n, 2 r), by one product of matrices."""
        weight = torch.cat([self.query.weight, self.key.weight])
        with no_autocast(hidden.device):
            return F.linear(hidden.to(weight.dtype), weight).to(hidden.dtype)

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        query_position: Tensor,
        row_position: Tensor,
        log_window: float,
        shift: float,
    ) -> Tensor:
        """s (b, q, r), in the gate's dtype, of interaction queries (b, q, rank), keys (b, r, rank).

        Positions are int64, (b, q) and (b, r), counted from the first token of each sequence.
        """
        age = query_position[..., :, None] - row_position[..., None, :]
        return self.content(query, key) + self.forgetting(age, log_window, shift)

    def ranking(self, query: Tensor, key: Tensor, age: Tensor) -> Tensor:
        """s (b, q, r) but for what is the same for all rows: content, less what age takes off.

        Shapes as in `scores`, age (b, q, r) int64; ages below 1 count as 1.
        """
        dtype = self.slope.dtype
        faded = age.clamp_min(1).to(dtype).log_().mul_(-self.slope)
        with no_autocast(query.device):
            pair = query.to(dtype), key.to(dtype).transpose(1, 2)
            return torch.baddbmm(faded, *pair, alpha=query.shape[-1] ** -0.5)

    def content(self, query: Tensor, key: Tensor) -> Tensor:
        """The part of the score (b, q, r) that depends on the tokens."""
        dtype = self.query.weight.dtype
        with no_autocast(query.device):
            product = query.to(dtype) @ key.to(dtype).transpose(-1, -2)
            scaled: Tensor = product * query.shape[-1] ** -0.5
        return scaled

    def forgetting(self, age: Tensor, log_window: float, shift: float) -> Tensor:
        """The part that depends on the age alone, int64 of any shape; ages below 1 count as 1."""
        since = log_window - age.clamp_min(1).to(self.slope.dtype).log()
        forgotten: Tensor = self.slope * since + (self.bias + shift)
        return forgotten
