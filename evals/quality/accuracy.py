"""Scores of many documents as one: mean, standard error, difference, and what was evicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ctxprune.pruner.engine.usage import Usage
from ctxprune.pruner.errors import CtxpruneError

# What a metric's standard error is called, as lm-eval does.
ERROR = "_stderr"
# A result's key for the metrics of each document, which are means over them.
VALUES = "values"


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

    `sparsity`: share of the earlier tokens that were gone when a query looked. Of the end of a
    text, on average: `rows` that a layer held, None if dense; `cache_sparsity`, the share of its
    tokens that were gone. `capped`: share of the times that the cap on rows was asked at which it
    made some leave.
    """
    return {
        "sparsity": usage.sparsity,
        "rows": usage.rows,
        "cache_sparsity": usage.cache_sparsity,
        "capped": usage.capped_share,
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error: None of a single value, which cannot tell."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, None
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (n - 1) / n)


def finite(result: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with null for each that is no finite number, and `not_finite`: what it was.

    `values` lack the metrics of which a document has such a number.
    """
    lost = {
        name: str(figure)
        for name, figure in result.items()
        if isinstance(figure, float) and not math.isfinite(figure)
    }
    values = {
        metric: found for metric, found in result[VALUES].items() if all(map(math.isfinite, found))
    }
    told = {"not_finite": lost} if lost else {}
    return {**result, **dict.fromkeys(lost), **told, VALUES: values}


def exponential(mean: float) -> float:
    """A perplexity: exp of a mean negative log-likelihood; infinite where it is beyond a float."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def perplexity_of(losses: Sequence[float]) -> dict[str, float]:
    """`perplexity`: exp of the mean of negative log-likelihoods (in nats); `perplexity_stderr`."""
    mean, stderr = mean_and_error(losses)
    perplexity = exponential(mean)
    errors = {} if stderr is None else {f"perplexity{ERROR}": perplexity * stderr}
    return {"perplexity": perplexity, **errors}


def against(
    values: Mapping[str, Sequence[float]], dense: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """Metric -> mean `difference` to the dense model on the same documents, and its `stderr`.

    Far smaller than the errors of both: what makes a document hard is hard for both.

    Args:
        values, dense: metric -> its value on each document, in the same order.
    """
    found = {}
    for metric, own in values.items():
        if metric in dense and len(dense[metric]) == len(own):
            pairs = zip(own, dense[metric], strict=True)
            difference, stderr = mean_and_error([one - other for one, other in pairs])
            found[metric] = {"difference": difference}
            if stderr is not None:
                found[metric]["stderr"] = stderr
    return found


def accuracy(name: str, hits: Sequence[bool], usage: Usage, sparsity: float) -> dict[str, Any]:
    """`acc` with its `acc_stderr`, what `used` says, `n`, and `values` of each answer.

    Args:
        name: of the task.
        hits: whether each answer was right; one at least.
        usage: of the forward passes that gave them.
        sparsity: the level asked for.

    Raises:
        CtxpruneError: if the level asks for pruning and not one token was evicted.
    """
    refuse_dense(name, usage, sparsity)
    values = [float(hit) for hit in hits]
    acc, stderr = mean_and_error(values)
    errors = {} if stderr is None else {f"acc{ERROR}": stderr, "stderr": stderr}
    return {"acc": acc, **errors, **used(usage), "n": len(hits), VALUES: {"acc": values}}
