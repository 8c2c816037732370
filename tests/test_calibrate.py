"""Calibration: keep ratios under one threshold, the power of budgets, the weight of attention."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_model

from ctxprune.pruner.checkpoints import adapter
from ctxprune.pruner.checkpoints.checkpoint import read_config
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.config import PruneConfig, TuneConfig
from ctxprune.pruner.engine.handle import Handle, attach, new_gates
from ctxprune.pruner.engine.soft import Level, SoftAttention, prior
from ctxprune.pruner.errors import Interrupted
from ctxprune.pruner.training import calibrate as calibrating
from ctxprune.pruner.training.calibrate import (
    MULTIPLES,
    PASSAGES,
    POWERS,
    STANDARD,
    calibrate,
    keep_ratios,
    passes_of,
    pick,
    recalled,
    to_power,
)
from ctxprune.pruner.training.divergence import Reference
from ctxprune.pruner.training.tune import tune

CONTEXT = 96
WINDOWS = torch.randint(2, 300, (3, CONTEXT), generator=torch.Generator().manual_seed(9))
RATIOS = {0.5: (0.9, 0.4, 0.2), 0.8: (0.4, 0.15, 0.05)}


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
@pytest.mark.parametrize("ratios", [*RATIOS.values(), (1.0, 1.0, 0.2), (0.3, 0.3, 0.3), (0.0, 0.5)])
def test_a_power_keeps_the_sum_and_the_order(ratios: tuple[float, ...], power: float) -> None:
    raised = to_power(ratios, power)
    assert sum(raised) == pytest.approx(sum(ratios), abs=1e-9)
    assert all(0.0 <= ratio <= 1.0 for ratio in raised)
    by_ratio = [raised[layer] for layer in sorted(range(len(ratios)), key=ratios.__getitem__)]
    assert by_ratio == sorted(by_ratio)


def test_a_power_is_the_ratio_of_the_ratios_until_a_layer_is_full() -> None:
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

    def picked(*running: float) -> float:
        pairs = zip(POWERS, running, asked.values(), strict=True)
        return pick({power: (of_text, recall) for power, of_text, recall in pairs})

    assert picked(1.0, 1.2, 1.3) == 1.0
    assert picked(1.0, 1.09, 1.3) == 1.5
    assert picked(1.0, 1.09, 1.05) == 2.0
    assert picked(1.3, 1.0, 1.3) == 1.5
    # A difference from the dense model can be below 0 by rounding.
    assert picked(-1e-9, 0.1, 0.2) == 1.0
    assert pick({1.0: (1.0, 0.1), 1.5: (1.0, 0.1), 2.0: (1.0, 0.2)}) == 1.0


@pytest.mark.parametrize("level", [0.5, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_ratios_are_what_one_threshold_leaves(family: str, level: float) -> None:
    """They meet the level, and reading once more under their threshold leaves the same."""
    handle = scattered_handle(family)
    found: list[float] = []

    def quantile(scores: torch.Tensor, level: float) -> float:
        found.append(original(scores, level))
        return found[-1]

    original = calibrating._quantile
    passes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "_quantile", quantile)
        ratios = keep_ratios(handle.model, WINDOWS, level, lambda: passes.append(1))
    assert len(passes) == len(WINDOWS) + 1
    assert 1 - sum(ratios) / len(ratios) == pytest.approx(level, abs=1e-3)
    again = torch.zeros(len(handle.gates))
    for window in WINDOWS:
        soft = SoftAttention(Level(prior(level, CONTEXT), -found[-1]), handle.config, hard=True)
        with handle.running(soft), torch.no_grad():
            handle.model(window[None], use_cache=False)
        again += torch.stack([soft.hard_kept[layer] for layer in range(len(again))]) / len(WINDOWS)
    assert again.tolist() == pytest.approx(ratios, abs=0.02)


def test_power_and_weight_are_those_that_lose_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power first, with the weight of training; then the weight, with that power."""
    handle = scattered_handle("gpt2")
    ratios = {level: (0.9 - level, 1.0 - level, 1.1 - level) for level in STANDARD}
    end = CONTEXT - PASSAGES * (CONTEXT // 32)
    asked: list[tuple[float, PruneConfig]] = []
    # A divergence on running text, and one on what is recalled.
    answers = [(1.0, 0.3), (1.05, 0.2), (2.0, 0.1), (0.9, 9.0), (1.2, 0.1)]

    class Told:
        def __init__(self, _: object, windows: torch.Tensor, places: torch.Tensor, __: object):
            assert torch.equal(windows, recalled(WINDOWS))
            # The first prediction of what is recalled is made at the last token before it.
            self.recalled = places >= end - 1
            assert places[self.recalled].tolist() == list(range(end - 1, CONTEXT - 1))
            assert places[~self.recalled].tolist() == list(range(0, end - 1, 4))

        def divergence(self, level: float, config: PruneConfig) -> torch.Tensor:
            running, recall = answers[len(asked)]
            asked.append((level, config))
            # The second window loses four times as much: a typical one twice.
            return torch.where(self.recalled, recall, running) * torch.tensor([[0.5], [2.0]])

    monkeypatch.setattr(calibrating, "Reference", Told)
    monkeypatch.setattr(calibrating, "keep_ratios", lambda m, w, level, t: ratios[level])
    made = calibrate(handle.model, WINDOWS, 0.8)
    base = replace(handle.config, tuned=0.8, context=CONTEXT)
    tried = [(power, 1.0) for power in POWERS] + [(1.5, MULTIPLES[0]), (1.5, MULTIPLES[2])]
    assert asked == [
        (0.8, replace(base, levels={0.8: to_power(ratios[0.8], power)}, attention_bonus=weight))
        for power, weight in tried
    ]
    levels = {level: to_power(kept, 1.5) for level, kept in ratios.items()}
    assert made == replace(base, levels=levels, attention_bonus=MULTIPLES[2])


def test_where_the_margin_alone_decides_there_is_no_weight_to_pick() -> None:
    handle = scattered_handle("gpt2")
    handle.config = replace(handle.config, attention_bonus=0.0)
    assert calibrate(handle.model, WINDOWS, 0.8).attention_bonus == 0.0


@pytest.mark.parametrize("bonus", [0.0, 1.0])
@pytest.mark.parametrize("sparsity", [0.8, 0.55])
def test_every_pass_is_counted_beforehand(
    bonus: float, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = scattered_handle("llama")
    handle.config = replace(handle.config, attention_bonus=bonus)
    monkeypatch.setattr("ctxprune.pruner.training.divergence.PASS", 2 * CONTEXT)
    told: list[tuple[int, int]] = []
    with _counted(handle) as passes:
        made = calibrate(handle.model, WINDOWS, sparsity, lambda *at: told.append(at))
    total = passes_of(handle.model, WINDOWS, sparsity)
    assert len(passes) == total
    assert told == [(done, total) for done in range(1, total + 1)]
    assert list(made.levels) == sorted({*STANDARD, sparsity})


class _counted:
    """The forward passes of a model."""

    def __init__(self, handle: Handle) -> None:
        self._passes: list[int] = []
        self._hook = handle.model.register_forward_hook(lambda *_: self._passes.append(1))

    def __enter__(self) -> list[int]:
        return self._passes

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_is_that_of_the_engine_from_the_dense_model(family: str) -> None:
    """Window by window, with `use`; the handle is left as it was."""
    handle = scattered_handle(family)
    before = handle.config
    places = torch.tensor([0, 7, 40, 41, 90])
    passes: list[int] = []
    reference = Reference(handle.model, WINDOWS, places, lambda: passes.append(1))
    configs = {
        level: replace(before, context=CONTEXT, levels={level: ratios})
        for level, ratios in RATIOS.items()
    }
    found = [reference.divergence(level, config) for level, config in configs.items()]
    assert handle.config is before and handle.policy is None
    for (level, config), losses in zip(configs.items(), found, strict=True):
        handle.config = config
        expected = divergence(handle, WINDOWS, level)[:, places]
        assert losses.min() >= -1e-6 and losses.max() > 1e-3
        torch.testing.assert_close(losses, expected.double(), atol=1e-5, rtol=1e-4)
    assert len(passes) == len(RATIOS) + 1


def divergence(handle: Handle, windows: torch.Tensor, level: float) -> torch.Tensor:
    """(windows, n - 1), from the dense model, of every token but the first."""
    each = []
    for window in windows:
        handle.use("gate", 0.0)
        dense = _log_probabilities(handle, window)
        handle.use("gate", level)
        pruned = _log_probabilities(handle, window)
        each.append((dense.exp() * (dense - pruned)).sum(-1))
    return torch.stack(each)


def _log_probabilities(handle: Handle, window: torch.Tensor) -> torch.Tensor:
    """(n - 1, vocabulary), of every token but the first."""
    with torch.no_grad():
        logits = handle.model(window[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1)


def test_tuning_stores_what_calibration_picked(
    dense_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrating, "MULTIPLES", (3.0,))
    monkeypatch.setattr(calibrating, "pick", lambda losses: 1.5)
    monkeypatch.setattr(Reference, "divergence", _less_for_three)
    source, made = tmp_path / "m", tmp_path / "tuned"
    convert(str(dense_folder("gpt2")), source, {})
    options = TuneConfig(data=str(text_file), steps=1, context=64, train="lora")
    tune(source, made, options)
    assert read_config(source).attention_bonus == 1.0
    assert read_config(made).attention_bonus == 3.0
    assert adapter.read(made / adapter.FILE).about.config.attention_bonus == 3.0


def _less_for_three(reference: Reference, level: float, config: PruneConfig) -> torch.Tensor:
    return torch.ones(1, len(reference._places)) / config.attention_bonus


def test_a_stop_is_obeyed_while_calibrating(
    dense_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """The trained state is kept: going on trains nothing again, and gives the same folder."""
    source = tmp_path / "m"
    convert(str(dense_folder("gpt2")), source, {})
    options = TuneConfig(data=str(text_file), steps=2, context=64, train="gates")
    whole = tune(source, tmp_path / "whole", options)

    def stop(done: int, total: int, _: float) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 2 of 2"):
        tune(source, tmp_path / "parts", options, on_calibration=stop)
    assert not (tmp_path / "parts").exists()
    steps: list[object] = []
    parts = tune(source, tmp_path / "parts", options, resume=True, on_step=steps.append)
    assert not steps
    assert read_config(parts) == read_config(whole)
    assert not (tmp_path / ".parts.tuning").exists()


@pytest.mark.parametrize(("context", "count"), [(96, 4000), (1024, 30_000)])
def test_the_sample_of_pairs_favours_no_age(context: int, count: int) -> None:
    """Ages are as frequent as among all pairs: of age a there are context - a."""
    later, earlier = calibrating._sample(context, count)
    ages = (later - earlier).double()
    assert ages.min() >= 1 and later.max() < context and len(ages) == count
    all_ages = torch.arange(1, context, dtype=torch.float64)
    weights = context - all_ages
    for bound in (context // 32, context // 8, context // 2):
        expected = float(weights[:bound].sum() / weights.sum())
        spread = (expected * (1 - expected) / count) ** 0.5
        assert float((ages <= bound).double().mean()) == pytest.approx(expected, abs=4 * spread)
