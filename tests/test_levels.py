"""What the layers hold at a sparsity and a length, from the levels that were calibrated."""

import pytest

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.rows import FEW, layer_windows, sparsity_of, window_of

LOW, HIGH = (0.8, 0.5, 0.2), (0.3, 0.2, 0.1)
CONFIG = PruneConfig(context=1024, levels={0.5: LOW, 0.8: HIGH})


def divided(rows: float, shares: tuple[float, ...]) -> list[float]:
    """The equation written out: windows drawn to their mean by 1 / (1 + (rows / 8)^2)."""
    windows = [window_of(1.0 - share, CONFIG.context) for share in shares]
    even = 1.0 / (1.0 + (rows / 8.0) ** 2)
    return [even * sum(windows) / 3 + (1.0 - even) * window for window in windows]


@pytest.mark.parametrize("context", [64, 1024, 8192])
@pytest.mark.parametrize("rows", [4.0, 8.0, 30.0])
def test_the_rows_decide_how_they_are_divided(rows: float, context: int) -> None:
    """Beyond the calibrated levels the nearest one holds, at any length of text."""
    windows = layer_windows(CONFIG, sparsity_of(rows, context), context)
    assert windows == pytest.approx(divided(rows, HIGH))


def test_between_levels_shares_are_linear() -> None:
    shares = tuple((a + 2 * b) / 3 for a, b in zip(LOW, HIGH, strict=True))
    rows = window_of(0.7, CONFIG.context)
    assert layer_windows(CONFIG, 0.7, CONFIG.context) == pytest.approx(divided(rows, shares))


def test_few_rows_are_divided_evenly_and_many_as_calibrated() -> None:
    few, half, many = (
        layer_windows(CONFIG, sparsity_of(rows, 4096), 4096) for rows in (0.5, FEW, 100)
    )
    windows = [window_of(1.0 - share, CONFIG.context) for share in HIGH]
    own = max(windows) / sum(windows)
    assert max(few) < 1.01 * min(few)
    assert max(half) / sum(half) == pytest.approx((own + 1 / 3) / 2)
    assert max(many) / sum(many) == pytest.approx(own, rel=0.01)
