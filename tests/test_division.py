"""The division of the rows among the layers: what a power does, and that the best one is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, tiny_model

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.handle import Handle, attach, new_gates
from ctxprune.pruner.training.division import PASSAGES, POWERS, divide, recalled, to_power

CONTEXT = 96
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("concession", [0.0, 0.05, 10.0])
def test_running_text_allows_a_power_and_recall_picks_it(
    family: str, concession: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxprune.pruner.training.division.CONCESSION", concession)
    handle = scattered_handle(family)
    before = handle.config
    windows = torch.randint(2, 300, (3, CONTEXT), generator=torch.Generator().manual_seed(9))
    chosen = divide(handle.model, windows, SHARES)
    assert handle.config is before and handle.policy is None
    end = CONTEXT - PASSAGES * (CONTEXT // 32)
    for level, shares in SHARES.items():
        running, asked = {}, {}
        for power in POWERS:
            raised = to_power(shares, power)
            handle.config = replace(before, context=CONTEXT, levels={level: raised})
            each = divergence(handle, recalled(windows), level)
            # Entry k is of token k + 1.
            running[raised] = float(each[: end - 1].sum())
            asked[raised] = float(each[end - 1 :].sum())
        handle.config = before
        found = chosen[level]
        assert running[found] <= (1 + concession) * min(running.values())
        better = [raised for raised in asked if asked[raised] < asked[found]]
        assert all(running[raised] > (1 + concession) * min(running.values()) for raised in better)
        assert better or concession > 0, "where nothing is held back, the test says nothing"


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
