"""The division of the rows among the layers: what a power does, and that the best one is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, tiny_model

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.handle import Handle, attach, new_gates
from ctxprune.pruner.training.divergence import divergences
from ctxprune.pruner.training.division import PASSAGES, POWERS, divide, pick, recalled, to_power

CONTEXT = 96
WINDOWS = torch.randint(2, 300, (3, CONTEXT), generator=torch.Generator().manual_seed(9))
SHARES = {0.5: (0.9, 0.4, 0.2), 0.8: (0.4, 0.15, 0.05)}


def scattered_handle(family: str) -> Handle:
    """The handle of a tiny model whose gates say different things of different tokens."""
    model = tiny_model(family)
    config = PruneConfig(rank=8)
    gates = new_gates(model, config)
    torch.manual_seed(1)
    for gate in gates:
        torch.nn.init.normal_(gate.key.weight, std=1.0)
    return attach(model, gates, config)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("shares", [*SHARES.values(), (1.0, 1.0, 0.2), (0.3, 0.3, 0.3), (0.0, 0.5)])
def test_a_power_keeps_the_sum_and_the_order(shares: tuple[float, ...], power: float) -> None:
    raised = to_power(shares, power)
    assert sum(raised) == pytest.approx(sum(shares), abs=1e-9)
    assert all(0.0 <= share <= 1.0 for share in raised)
    by_share = [raised[layer] for layer in sorted(range(len(shares)), key=shares.__getitem__)]
    assert by_share == sorted(by_share)


def test_a_power_is_the_ratio_of_the_shares_until_a_layer_is_full() -> None:
    first, second, third = to_power((0.4, 0.2, 0.1), 2.0)
    assert (first / second, second / third) == pytest.approx((4.0, 4.0))
    assert to_power((0.4, 0.2, 0.1), 1.0) == pytest.approx((0.4, 0.2, 0.1))
    full, *rest = to_power((0.9, 0.4, 0.2), 2.0)
    assert full == 1.0 and rest == pytest.approx((0.4, 0.1))


@pytest.mark.parametrize("context", [16, 96, 1000])
def test_what_is_asked_for_was_read_before(context: int) -> None:
    windows = torch.arange(2 * context).view(2, context)
    asked = recalled(windows)
    length = max(context // 32, 1)
    end = context - PASSAGES * length
    assert torch.equal(asked[:, :end], windows[:, :end]) and asked.shape == windows.shape
    for before, passages in zip(windows, asked[:, end:].unflatten(1, (PASSAGES, -1)), strict=True):
        for passage in passages:
            assert torch.equal(passage, torch.arange(length) + passage[0])
            assert passage[0] >= before[0] and passage[-1] <= before[end - 1]
    assert torch.equal(asked, recalled(windows))


def test_running_text_allows_a_power_and_recall_picks_it() -> None:
    asked = {1.0: 0.9, 1.5: 0.5, 2.0: 0.1}
    assert pick({1.0: 1.0, 1.5: 1.2, 2.0: 1.3}, asked) == 1.0
    assert pick({1.0: 1.0, 1.5: 1.09, 2.0: 1.3}, asked) == 1.5
    assert pick({1.0: 1.0, 1.5: 1.09, 2.0: 1.05}, asked) == 2.0
    assert pick({1.0: 1.3, 1.5: 1.0, 2.0: 1.3}, asked) == 1.5
    assert pick({1.0: 1.0, 1.5: 1.0, 2.0: 1.0}, {1.0: 0.1, 1.5: 0.1, 2.0: 0.2}) == 1.0
    # A difference from the dense model can be below 0 by rounding.
    assert pick({1.0: -1e-9, 1.5: 0.1, 2.0: 0.2}, asked) == 1.0


def test_levels_are_divided_by_what_their_candidates_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level has candidates of its own, measured on a text and on what it repeats of it."""
    handle = scattered_handle("gpt2")
    end = CONTEXT - PASSAGES * (CONTEXT // 32)
    losses = {0.5: [(1.0, 0.3), (1.05, 0.2), (2.0, 0.1)], 0.8: [(3.0, 0.5), (1.0, 0.4), (1.0, 0.3)]}

    def lost(
        model: object,
        windows: torch.Tensor,
        ways: Sequence[tuple[float, PruneConfig]],
        *,
        parts: Sequence[slice],
        **_: object,
    ) -> torch.Tensor:
        assert model is handle.model and torch.equal(windows, recalled(WINDOWS))
        # The last prediction on running text is of its last token, the first on what is asked for
        # of the first token there.
        assert parts == (slice(end), slice(end - 1, None))
        candidates = [(level, to_power(SHARES[level], p)) for level in SHARES for p in POWERS]
        assert [(level, *config.levels.values()) for level, config in ways] == candidates
        assert all(config.context == CONTEXT and [*config.levels] == [at] for at, config in ways)
        return torch.tensor([pair for level in losses for pair in losses[level]])

    monkeypatch.setattr("ctxprune.pruner.training.division.divergences", lost)
    divided = divide(handle.model, WINDOWS, SHARES)
    assert divided == {0.5: to_power(SHARES[0.5], 1.5), 0.8: to_power(SHARES[0.8], 2.0)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_is_that_of_the_engine_from_the_dense_model(family: str) -> None:
    """Window by window, with `use`; the handle is left as it was."""
    handle = scattered_handle(family)
    before = handle.config
    ways = [
        (level, replace(before, context=CONTEXT, levels={level: SHARES[level]})) for level in SHARES
    ]
    parts = (slice(60), slice(59, None))
    found = divergences(handle.model, WINDOWS, ways, parts=parts, doing="measuring")
    assert handle.config is before and handle.policy is None
    assert found.shape == (2, 2) and found.min() > 0.0
    for (level, config), losses in zip(ways, found, strict=True):
        handle.config = config
        each = divergence(handle, WINDOWS, level) / len(WINDOWS)
        expected = torch.stack([each[:59].mean(), each[59:].mean()]).double()
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-4)


def divergence(handle: Handle, windows: torch.Tensor, level: float) -> torch.Tensor:
    """(n - 1,), from the dense model, of every token but the first: the sum over the windows."""
    each = torch.zeros(windows.shape[1] - 1)
    for window in windows:
        handle.use("gate", 0.0)
        dense = _log_probabilities(handle, window)
        handle.use("gate", level)
        pruned = _log_probabilities(handle, window)
        each += (dense.exp() * (dense - pruned)).sum(-1)
    return each


def _log_probabilities(handle: Handle, window: torch.Tensor) -> torch.Tensor:
    """(n - 1, vocabulary), of every token but the first."""
    with torch.no_grad():
        logits = handle.model(window[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1)
