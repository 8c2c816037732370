"""The weight of the attention received: the multiple that diverges least is taken, and stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from test_division import divergence, scattered_handle

from ctxprune.pruner.checkpoints import adapter
from ctxprune.pruner.checkpoints.checkpoint import read_config
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.config import TuneConfig
from ctxprune.pruner.training.tune import tune
from ctxprune.pruner.training.weighing import MULTIPLES, weigh

WINDOWS = torch.randint(2, 300, (3, 96), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_multiple_that_diverges_least_is_taken(family: str) -> None:
    handle = scattered_handle(family)
    before = replace(handle.config, context=96, levels={0.5: (0.9, 0.4, 0.2)}, tuned=0.5)
    taken = set()
    for bonus in (8.0, 16.0, 32.0):
        handle.config = config = replace(before, attention_bonus=bonus)
        found = weigh(handle.model, WINDOWS, config)
        assert handle.config is config and handle.policy is None
        loss = {}
        for multiple in MULTIPLES:
            handle.config = replace(before, attention_bonus=multiple * bonus)
            loss[multiple * bonus] = float(divergence(handle, WINDOWS, 0.5).sum())
        handle.use("gate", 0.0)
        assert found == min(loss, key=loss.__getitem__)
        taken.add(found / bonus)
    assert taken == set(MULTIPLES), "were it always the same one, the test would say little"


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
