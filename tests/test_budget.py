"""How many rows stay at a border: the share of the pairs, and how rows grow along a text."""

import pytest
import torch

from ctxprune.pruner.rows import FEW, Budget, sparsity_of

# Many, so that rounding up in some layers and down in others cancels out.
EVEN = (1.0,) * 300


def rows_at(budget: Budget, layer: int, seen: int, sequence: int = 0) -> int:
    """Rows that stay after so many tokens of a sequence."""
    asked = torch.full((budget.period(layer).shape[0], 1), seen)
    return int(budget.after(layer, asked)[sequence])


def mean_rows(budget: Budget, seen: int) -> float:
    """The mean over the layers."""
    return sum(rows_at(budget, layer, seen) for layer in range(len(EVEN))) / len(EVEN)


def kept_by_hand(budget: Budget, layer: int, context: int) -> int:
    """Pairs j < k that are left, token by token: evict at borders, then look, then be read."""
    held = kept = 0
    for k in range(context):
        if k % int(budget.period(layer)[0]) == 0:
            held = min(held, rows_at(budget, layer, k))
        kept += held
        held += 1
    return kept


@pytest.mark.parametrize("context", [30, 80, 1024, 5000])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_the_share_of_the_pairs_is_met(sparsity: float, context: int) -> None:
    shares = tuple(0.5 + 0.1 * layer for layer in range(30))
    budget = Budget(sparsity, [context], [shares])
    kept = sum(kept_by_hand(budget, layer, context) for layer in range(30))
    pairs = 30 * context * (context - 1) / 2
    assert 1 - kept / pairs == pytest.approx(sparsity, abs=0.005)


@pytest.mark.parametrize("rows", [4, FEW, 12])
def test_few_rows_grow_along_the_text(rows: int) -> None:
    """rows(k) = rows(n) (k / n)^p with p = 1 / (1 + (rows / 8)^2), written out."""
    context = 128
    budget = Budget(sparsity_of(rows, context), [context], [EVEN])
    period = int(budget.period(0)[0])
    end = mean_rows(budget, context) + (period - 1) / 2
    power = 1 / (1 + (rows / 8) ** 2)
    for seen in (32, 64, 96):
        grown = end * (seen / context) ** power
        assert mean_rows(budget, seen) + (period - 1) / 2 == pytest.approx(grown, abs=0.05)
    assert mean_rows(budget, 32) < rows < mean_rows(budget, context)


def test_many_rows_are_as_many_from_the_start() -> None:
    budget = Budget(0.8, [4096], [EVEN])
    assert mean_rows(budget, 512) == pytest.approx(mean_rows(budget, 4096), rel=0.002)


def test_beyond_the_length_rows_stay_as_many() -> None:
    budget = Budget(0.8, [100], [EVEN])
    assert mean_rows(budget, 10_000) == mean_rows(budget, 100) > mean_rows(budget, 50)


def test_each_sequence_has_its_own_law() -> None:
    """In a batch each text has the rows that it has alone."""
    shares = (0.5, 1.0, 1.5)
    contexts = [40, 400, 100]
    batch = Budget(0.8, contexts, [shares] * 3)
    for sequence, context in enumerate(contexts):
        alone = Budget(0.8, [context], [shares])
        for layer in range(3):
            for seen in range(0, 500, 5):
                assert rows_at(batch, layer, seen, sequence) == rows_at(alone, layer, seen)
