"""How many rows a policy that goes by score may hold, and when it is asked.

Such a policy evicts after every `PERIOD`-th token of a sequence. In between the rows grow by one a
token, so the budget after n tokens is what makes the mean over the coming period the share asked
for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.pruner.config import PERIOD


def cap_period(max_rows: int) -> int:
    """Tokens of a sequence between two times that a cap on rows is enforced, a divisor of `PERIOD`.

    So many rows below the cap are left free for the tokens in between: at most a sixteenth of it.
    """
    period = PERIOD
    while period > 1 and period * 16 > max_rows:
        period //= 2
    return period


class Budget:
    """Rows that a sequence may hold.

    Args:
        sparsity: share of the earlier tokens to drop, in [0, 1).
        context: length of the texts, for which the sparsity is then met as a mean over all pairs
            j < k; None: the share holds for the tokens seen so far, at every moment.
        least: rows that are never refused.
    """

    def __init__(self, sparsity: float, context: int | None, least: int = 1) -> None:
        self.least = least
        self.share = 1.0 - sparsity
        if context is not None:
            self.share = self._share_for(sparsity, context)

    def after(self, seen: Tensor) -> Tensor:
        """Rows (int64, any shape) that may stay when `seen` tokens were seen, a border."""
        rows = (self.share * (seen + PERIOD / 2) - PERIOD / 2).ceil().long()
        return rows.clamp_min(self.least)

    def _share_for(self, sparsity: float, context: int) -> float:
        """Bisect the share under which `context` tokens have this sparsity."""
        earlier = torch.arange(context)
        border = earlier // PERIOD * PERIOD
        low, high = 0.0, 1.0
        for _ in range(40):
            self.share = (low + high) / 2
            at_border = torch.minimum(self.after(border), border)
            kept = (at_border + earlier - border).sum()
            if float(kept) > (1.0 - sparsity) * float(earlier.sum()):
                high = self.share
            else:
                low = self.share
        return high
