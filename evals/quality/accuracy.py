"""The score of a task of our own: how many answers were right, and what was evicted meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ctxprune.pruner.engine.usage import Usage
from ctxprune.pruner.errors import CtxpruneError


def refuse_dense(name: str, usage: Usage, sparsity: float) -> None:
    """Raise CtxpruneError if a level asks for pruning and not one token was evicted."""
    if sparsity > 0 and usage.evicted == 0:
        raise CtxpruneError(
            f"not one token was evicted on `{name}` at sparsity {sparsity:g}, so its score would "
            "be the dense model's",
            "its texts may be shorter than the protected tokens",
        )


def used(usage: Usage) -> dict[str, float | None]:
    """What every task says of what was evicted meanwhile.

    `sparsity`: share of the earlier tokens that were gone when a query looked; `rows`: that a
    layer held at the end of a text, on average, None if dense; `capped`: share of the times that
    the cap on rows was asked at which it made some leave.
    """
    return {"sparsity": usage.sparsity, "rows": usage.rows, "capped": usage.capped_share}


def accuracy(
    name: str, hits: Sequence[bool], usage: Usage, sparsity: float
) -> dict[str, float | None]:
    """`acc` with its `stderr`, what `used` says, and `n`.

    Args:
        name: of the task.
        hits: whether each answer was right; one at least.
        usage: of the forward passes that gave them.
        sparsity: the level asked for.

    Raises:
        CtxpruneError: if the level asks for pruning and not one token was evicted.
    """
    refuse_dense(name, usage, sparsity)
    n = len(hits)
    acc = sum(hits) / n
    # The standard error of a mean of zeros and ones; from a single one it cannot be told.
    stderr = {"stderr": math.sqrt(acc * (1 - acc) / (n - 1))} if n > 1 else {}
    return {"acc": acc, **stderr, **used(usage), "n": n}
