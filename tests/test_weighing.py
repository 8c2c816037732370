"""The weight of the attention received: the multiple that diverges least is taken, and stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_division import WINDOWS, scattered_handle

from ctxprune.pruner.checkpoints import adapter
from ctxprune.pruner.checkpoints.checkpoint import read_config
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.config import PruneConfig, TuneConfig
from ctxprune.pruner.training.tune import tune
from ctxprune.pruner.training.weighing import MULTIPLES, weigh


@pytest.mark.parametrize("best", range(len(MULTIPLES)))
def test_the_multiple_that_diverges_least_is_taken(
    best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = scattered_handle("gpt2")
    config = replace(handle.config, attention_bonus=8.0, levels={0.5: (0.5,) * 3}, tuned=0.5)

    def lost(
        model: object, windows: torch.Tensor, ways: Sequence[tuple[float, PruneConfig]], **_: object
    ) -> torch.Tensor:
        assert model is handle.model and torch.equal(windows, WINDOWS)
        assert ways == [(0.5, replace(config, attention_bonus=8.0 * m)) for m in MULTIPLES]
        return 1.0 - 0.1 * (torch.arange(len(ways)) == best)[:, None]

    monkeypatch.setattr("ctxprune.pruner.training.weighing.divergences", lost)
    assert weigh(handle.model, WINDOWS, config) == 8.0 * MULTIPLES[best]


def test_where_the_margin_alone_decides_there_is_no_weight_to_pick() -> None:
    handle = scattered_handle("gpt2")
    config = replace(handle.config, attention_bonus=0.0, tuned=0.8)
    assert weigh(handle.model, WINDOWS, config) == 0.0


def test_tuning_stores_the_weight_that_was_picked(
    dense_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ctxprune.pruner.training.weighing.MULTIPLES", (3.0,))
    source, made = tmp_path / "m", tmp_path / "tuned"
    convert(str(dense_folder("gpt2")), source, {})
    options = TuneConfig(data=str(text_file), steps=1, context=64, train="lora")
    phases: list[str] = []
    tune(source, made, options, on_phase=phases.append)
    assert "weighing the attention received, 0%" in phases
    assert read_config(source).attention_bonus == 1.0
    assert read_config(made).attention_bonus == 3.0
    assert adapter.read(made / adapter.FILE).about["config"]["attention_bonus"] == 3.0
