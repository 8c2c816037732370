"""Rows of a layer: the share of the pairs, how rows grow, how layers divide them, when they leave.

Everything here is arithmetic of the host.
"""

import pytest

from ctxprune.pruner.config import PERIOD, PruneConfig
from ctxprune.pruner.rows import (
    FEW,
    OBSERVERS,
    Plan,
    Rows,
    cap_interval,
    ceiling,
    interval_for,
    layer_windows,
    plan,
    sparsity_of,
    unlimited,
    window_of,
)

# Many layers, so that rounding up in some and down in others cancels out.
EVEN = (1.0,) * 300
LOW, HIGH = (0.8, 0.5, 0.2), (0.3, 0.2, 0.1)
CONFIG = PruneConfig(context=1024, levels={0.5: LOW, 0.8: HIGH})


def rows_of(
    sparsity: float, *contexts: int, shares: tuple[float, ...] = EVEN, least: int = 1
) -> Rows:
    """Of a batch of texts."""
    return Rows([plan(sparsity, context, shares, least) for context in contexts])


def mean_rows(rows: Rows, seen: int) -> float:
    """That stay after so many tokens, the mean over the layers."""
    return sum(rows.after(layer, 0, seen) for layer in range(len(EVEN))) / len(EVEN)


def kept_by_hand(rows: Rows, layer: int, context: int) -> int:
    """Pairs j < k that are left, token by token: evict after every interval, then look."""
    held = kept = 0
    for k in range(context):
        if k % rows.interval(layer, 0) == 0:
            held = min(held, rows.after(layer, 0, k))
        kept += held
        held += 1
    return kept


@pytest.mark.parametrize("context", [30, 80, 1024, 5000])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_the_share_of_the_pairs_is_met(sparsity: float, context: int) -> None:
    shares = tuple(0.5 + 0.1 * layer for layer in range(30))
    rows = rows_of(sparsity, context, shares=shares)
    kept = sum(kept_by_hand(rows, layer, context) for layer in range(30))
    pairs = 30 * context * (context - 1) / 2
    assert 1 - kept / pairs == pytest.approx(sparsity, abs=0.005)


@pytest.mark.parametrize("number", [4, FEW, 12])
def test_few_rows_grow_along_the_text(number: int) -> None:
    """rows(k) = rows(n) (k / n)^p with p = 1 / (1 + (rows / 8)^2), written out."""
    context = 128
    rows = rows_of(sparsity_of(number, context), context)
    between = (rows.interval(0, 0) - 1) / 2
    end = mean_rows(rows, context) + between
    power = 1 / (1 + (number / 8) ** 2)
    for seen in (32, 64, 96):
        grown = end * (seen / context) ** power
        assert mean_rows(rows, seen) + between == pytest.approx(grown, abs=0.05)
    assert mean_rows(rows, 32) < number < mean_rows(rows, context)


def test_many_rows_are_as_many_from_the_start() -> None:
    rows = rows_of(0.8, 4096)
    assert mean_rows(rows, 512) == pytest.approx(mean_rows(rows, 4096), rel=0.002)


def test_beyond_the_length_rows_stay_as_many() -> None:
    rows = rows_of(0.8, 100)
    assert mean_rows(rows, 10_000) == mean_rows(rows, 100) > mean_rows(rows, 50)


def test_each_sequence_has_its_own_law() -> None:
    """In a batch each text has the rows, the intervals and the limit that it has alone."""
    shares = (0.5, 1.0, 1.5)
    contexts = [40, 400, 100]
    batch = rows_of(0.8, *contexts, shares=shares)
    for sequence, context in enumerate(contexts):
        alone = rows_of(0.8, context, shares=shares)
        for layer in range(3):
            assert batch.interval(layer, sequence) == alone.interval(layer, 0)
            assert batch.limit(layer, sequence) == alone.limit(layer, 0)
            for seen in range(0, 500, 5):
                assert batch.after(layer, sequence, seen) == alone.after(layer, 0, seen)
                assert batch.step(layer, sequence, seen) == alone.step(layer, 0, seen)
    assert batch.longest == max(
        rows_of(0.8, context, shares=shares).longest for context in contexts
    )


def test_rows_that_are_never_refused() -> None:
    rows = rows_of(0.99, 200, shares=(0.1, 1.9), least=7)
    assert min(rows.after(layer, 0, seen) for layer in (0, 1) for seen in range(8, 200)) == 7


def test_an_interval_is_half_of_the_rows_or_an_eighth_of_many() -> None:
    rows = (0.5, 1, 3, 4, 8, 12, 16, 31, 63, 64, 255, 384, 400, 1023, 1024, 9000)
    intervals = [interval_for(number, 1000) for number in rows]
    assert intervals == [1, 1, 1, 2, 4, 4, 8, 8, 16, 32, 32, 48, 48, 112, 128, 128]


def test_it_is_a_quarter_of_the_rows_of_a_text_that_has_few() -> None:
    windows = (0.5, 4, 8, 26, 54, 84, 107, 108)
    assert [interval_for(2 * window, window) for window in windows] == [1, 1, 2, 4, 8, 16, 16, 32]
    made = plan(0.5, 4000, (0.1, 1.0), 1)
    window = window_of(0.5, 4000)
    layers = [2 * window * share / 1.1 for share in (0.1, 1.0)]
    assert list(made.intervals) == [interval_for(rows, window) for rows in layers]
    assert plan(0.5, 4000, (0.1, 1.0), 1, longest=8).intervals == (8, 8)


def steps_by_hand(rows: Rows, layer: int, sequence: int, total: int) -> list[int]:
    """After how many tokens the steps come, asked one after another."""
    steps, seen = [], 0
    while (seen := rows.step(layer, sequence, seen)) <= total:
        steps.append(seen)
    return steps


@pytest.mark.parametrize("total", [1, 300])
def test_steps_come_after_every_interval(total: int) -> None:
    rows = Rows([Plan((8, 16), ())])
    assert steps_by_hand(rows, 0, 0, total) == list(range(8, total + 1, 8))
    assert steps_by_hand(rows, 1, 0, total) == list(range(16, total + 1, 16))
    # A token that is not at a step asks for the same one as its neighbours.
    assert [rows.step(0, 0, seen) for seen in (0, 1, 7, 8, 9)] == [8, 8, 8, 16, 16]


@pytest.mark.parametrize("prompt", [1, 50, 64, 65, 128, 300])
def test_a_prompt_ends_with_a_step_of_its_observers(prompt: int) -> None:
    """Within it steps come where the last `OBSERVERS` tokens begin, and before; no row leaves."""
    few = Plan((8,), (tuple([0, *[5] * 100]),))
    rows = Rows([few, few], prompts=[prompt, 0])
    assert rows.prompted and not Rows([few]).prompted
    steps = steps_by_hand(rows, 0, 0, prompt + 40)
    within = [step for step in steps if step <= prompt]
    assert within == sorted(range(prompt, 0, -OBSERVERS))
    assert [step for step in steps if step > prompt] == [
        step for step in range(8, prompt + 41, 8) if step > prompt
    ]
    assert [rows.after(0, 0, step) for step in within] == [*within[:-1], 5 if prompt >= 8 else 0]
    assert steps_by_hand(rows, 0, 1, 40) == [8, 16, 24, 32, 40]


def test_a_cap_holds_between_steps_too() -> None:
    rows = Rows([plan(0.3, 2000, (0.5, 1.5), 1)], max_rows=128)
    assert rows.room == 128 - 8
    for layer in (0, 1):
        interval = rows.interval(layer, 0)
        assert interval == 8 and rows.limit(layer, 0) == 128
        assert max(rows.after(layer, 0, seen) for seen in range(0, 3000, 8)) == 120
    alone = Rows([unlimited(2)], max_rows=128)
    assert (alone.after(0, 0, 50), alone.after(0, 0, 5000)) == (50, 120)
    assert alone.limit(1, 0) == 128 and Rows([unlimited(2)]).limit(1, 0) is None


def test_a_cap_leaves_a_sixteenth_free_at_most() -> None:
    assert [cap_interval(n) for n in (16, 52, 104, 128, 255, 256, 4096)] == [1, 2, 4, 8, 8, 16, 16]
    assert PERIOD == 16


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("context", [16, 512, 4096])
def test_a_window_drops_the_share_asked_for(sparsity: float, context: int) -> None:
    width = window_of(sparsity, context)
    kept = width * context - width * (width + 1) / 2
    assert kept / (context * (context - 1) / 2) == pytest.approx(1 - sparsity)
    assert sparsity_of(width, context) == pytest.approx(sparsity)


@pytest.mark.parametrize(("first", "recent"), [(0, 1), (2, 3), (4, 1), (1, 16)])
def test_the_ceiling_is_what_protected_tokens_leave(first: int, recent: int) -> None:
    config = PruneConfig(protect_first=first, protect_recent=recent)
    dropped = sum(1 for k in range(60) for j in range(k) if j >= first and k - j >= max(recent, 1))
    assert ceiling(config, 60) == pytest.approx(dropped / (60 * 59 / 2))


def divided(number: float, shares: tuple[float, ...]) -> list[float]:
    """The equation written out: windows drawn to their mean by 1 / (1 + (rows / 8)^2)."""
    windows = [window_of(1.0 - share, CONFIG.context) for share in shares]
    even = 1.0 / (1.0 + (number / 8.0) ** 2)
    return [even * sum(windows) / 3 + (1.0 - even) * window for window in windows]


@pytest.mark.parametrize("context", [64, 1024, 8192])
@pytest.mark.parametrize("number", [4.0, 8.0, 30.0])
def test_the_rows_decide_how_they_are_divided(number: float, context: int) -> None:
    """Beyond the calibrated levels the nearest one holds, at any length of text."""
    windows = layer_windows(CONFIG, sparsity_of(number, context), context)
    assert windows == pytest.approx(divided(number, HIGH))


def test_between_levels_shares_are_linear() -> None:
    shares = tuple((a + 2 * b) / 3 for a, b in zip(LOW, HIGH, strict=True))
    number = window_of(0.7, CONFIG.context)
    assert layer_windows(CONFIG, 0.7, CONFIG.context) == pytest.approx(divided(number, shares))


def test_few_rows_are_divided_evenly_and_many_as_calibrated() -> None:
    few, half, many = (
        layer_windows(CONFIG, sparsity_of(number, 4096), 4096) for number in (0.5, FEW, 100)
    )
    windows = [window_of(1.0 - share, CONFIG.context) for share in HIGH]
    own = max(windows) / sum(windows)
    assert max(few) < 1.01 * min(few)
    assert max(half) / sum(half) == pytest.approx((own + 1 / 3) / 2)
    assert max(many) / sum(many) == pytest.approx(own, rel=0.01)
