"""The benchmark: what it holds, compares and reports. Its timings decide nothing here."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from rich.console import Console
from test_cli import ctxprune
from transformers import StaticCache

from ctxprune.evals.speed import bench as speed
from ctxprune.evals.speed.bench import MODES, BenchConfig, Comparison, bench, kv_bytes
from ctxprune.evals.speed.breakdown import RANGES
from ctxprune.evals.speed.speed_report import markdown, plot, rich_table
from ctxprune.evals.speed.subject import prompts
from ctxprune.evals.speed.training_cost import (
    DENSE,
    DISTILLED,
    GATED,
    LOCAL,
    TrainingCostConfig,
    training_cost,
)
from ctxprune.pruner.checkpoints.checkpoint import load
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.dense import DenseCache
from ctxprune.pruner.errors import CtxpruneError

Make = Callable[[str], Path]
CONTEXT = 96
QUICK = BenchConfig(
    batch=(2,), context=(CONTEXT,), sparsity=(0.0, 0.8), forced=True, repeats=2, steps=3, prefills=1
)


@pytest.fixture
def quick(text_file: Path) -> BenchConfig:
    return dataclasses.replace(QUICK, text=str(text_file))


def by_mode(results: dict[str, Any]) -> dict[tuple[str, float], dict[str, Any]]:
    return {(row["mode"], row["sparsity"]): row for row in results["rows"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_is_measured(family: str, tiny_folder: Make, quick: BenchConfig) -> None:
    results = bench(tiny_folder(family), quick)
    rows = by_mode(results)
    assert list(rows) == [
        ("dense-dynamic", 0.0),
        ("dense-static", 0.0),
        ("pruned", 0.0),
        ("pruned", 0.8),
        ("oracle", 0.8),
    ]
    for row in rows.values():
        assert (row["batch"], row["context"], row["text_repeated"]) == (2, CONTEXT, False)
        assert 0 < row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"]
        assert row["decode_tokens_per_s"] == pytest.approx(2e3 / row["step_ms"]["median"])
        if row["mode"] != "oracle":
            assert 0 < row["prefill_s"]["median"] <= row["ttft_s"]
            assert row["peak_bytes"] is None or row["peak_bytes"] > row["kv_bytes"]
    assert max(rows[mode, 0.0]["speedup"] for mode in MODES[:2]) == 1.0
    dense, pruned, oracle = rows["dense-dynamic", 0.0], rows["pruned", 0.8], rows["oracle", 0.8]
    assert dense["kv_bytes"] < rows["dense-static", 0.0]["kv_bytes"]
    assert oracle["kv_bytes"] < pruned["kv_bytes"] < dense["kv_bytes"]
    assert pruned["cache_sparsity"] == pytest.approx(0.8, abs=0.1)
    assert pruned["sparsity_realised"] == pytest.approx(0.8, abs=0.005)
    assert pruned["padding"] == 1.0
    assert oracle["rows_kept"] - 1 < pruned["rows_kept"] <= oracle["rows_kept"] < CONTEXT / 3
    assert pruned["of_oracle"] == pytest.approx(
        pruned["decode_tokens_per_s"] / oracle["decode_tokens_per_s"]
    )
    assert [mode for mode, row in rows.items() if "breakdown" in row] == [("pruned", 0.8)]
    parts = pruned["breakdown"]
    assert list(parts) == [*RANGES, "rest"] and min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(pruned["step_ms"]["median"])
    assert results["forced"] and not results["random_weights"]
    json.dumps(results)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modes_do_the_work_they_are_named_for(
    family: str, tiny_folder: Make, quick: BenchConfig
) -> None:
    model = load(tiny_folder(family), sparsity=0.0)
    ids = torch.randint(0, model.config.vocab_size, (2, CONTEXT))
    comparison = Comparison(model, quick, ids, lambda line: None)
    rows = comparison.measure()
    dynamic, static, in_place, pruned, oracle = comparison.lanes
    read = CONTEXT + quick.steps * (quick.repeats + 1)
    for lane, row in zip(comparison.lanes, rows, strict=True):
        assert lane.cache is not None
        assert lane.decoded == read - CONTEXT + quick.steps * (lane is pruned)
        if lane is not oracle:
            assert int(lane.cache.get_seq_length()) == CONTEXT + lane.decoded
            assert row["kv_bytes"] <= kv_bytes(lane.cache)
    assert isinstance(static.cache, StaticCache) and static.cache.get_max_length() == read
    assert isinstance(in_place.cache, DenseCache) and isinstance(oracle.cache, DenseCache)
    assert not isinstance(dynamic.cache, DenseCache)
    # Dense is dense, whichever cache it has.
    assert dynamic.token is not None and static.token is not None and in_place.token is not None
    assert dynamic.token.equal(static.token) and dynamic.token.equal(in_place.token)
    assert isinstance(pruned.cache, PrunedCache)
    columns = [column for table in pruned.cache.tables() for column in table.columns.values()]
    positions = [table.position for table in pruned.cache.tables() if table.position is not None]
    assert kv_bytes(pruned.cache) == sum(tensor.nbytes for tensor in columns + positions)
    # Forced: in every layer others survive, but in every sequence of a layer the same.
    held = [set(table.held[0].tolist()) for table in pruned.cache.tables()]
    assert held[0] != held[1]
    for table in pruned.cache.tables():
        assert table.held[0].sort().values.equal(table.held[1].sort().values)
    # An oracle reads as many rows as were kept, on the mean of its last burst.
    kept = max(int(table.rows()[0]) for table in pruned.cache.tables())
    assert abs(oracle.cache.get_seq_length() - quick.steps // 2 - kept) < kept / 2


def test_a_cap_on_rows_prunes_alone(tiny_folder: Make, quick: BenchConfig) -> None:
    config = dataclasses.replace(
        quick, policy="sink", forced=False, max_rows=48, sparsity=(0.0,), modes=("pruned",)
    )
    results = bench(tiny_folder("gpt2"), config)
    (row,) = results["rows"]
    assert results["max_rows"] == 48 and row["rows_kept"] <= 48
    assert row["speedup"] is None and row["of_oracle"] is None and "breakdown" in row


def test_a_killed_benchmark_goes_on(
    tiny_folder: Make, quick: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state, calls = tiny_folder("gpt2"), tmp_path / "state" / "bench.json", []
    config = dataclasses.replace(quick, context=(32, 48), modes=("dense-dynamic",), repeats=1)
    real = Comparison.measure

    def killed_on_second(self: Comparison) -> list[dict[str, Any]]:
        calls.append(self.context)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(speed.Comparison, "measure", killed_on_second)
    with pytest.raises(KeyboardInterrupt):
        bench(folder, config, state=state)
    lines: list[str] = []
    resumed = bench(folder, config, state=state, on_event=lines.append)
    assert lines[0] == "batch 2, context 32: already done, kept"
    assert [row["context"] for row in resumed["rows"]] == [32, 48]
    # What was finished is measured anew.
    bench(folder, config, state=state)
    assert calls == [32, 48, 48, 32, 48]


def test_an_architecture_has_random_weights(tmp_path: Path) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(tiny_model("llama").config.to_json_string())
    config = dataclasses.replace(QUICK, architecture=str(shape), forced=False, dtype="bfloat16")
    results = bench(None, config)
    assert results["random_weights"] and results["forced"] and not results["positions_enlarged"]
    assert by_mode(results)["pruned", 0.8]["cache_sparsity"] > 0.7
    bounded = tiny_model("gpt2").config
    bounded.max_position_embeddings = CONTEXT + 11
    shape.write_text(bounded.to_json_string())
    with pytest.raises(CtxpruneError, match="96 and 12 decoded tokens need 108 positions"):
        bench(None, config)


def test_a_named_architecture_gets_the_positions_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = tiny_model("gpt2").config
    small.max_position_embeddings = 8
    monkeypatch.setattr("ctxprune.evals.speed.subject.AutoConfig.for_model", lambda name: small)
    config = dataclasses.replace(QUICK, architecture="gpt2", modes=("dense-static",), repeats=1)
    assert bench(None, config)["positions_enlarged"]


def test_prompts_are_spread_and_repeated() -> None:
    text = torch.arange(10)[:, None]
    assert prompts(text, 4).flatten().tolist() == [0, 2, 5, 7]
    assert prompts(text[:2], 5).flatten().tolist() == [0, 1, 0, 1, 0]


def test_reports(tiny_folder: Make, quick: BenchConfig, tmp_path: Path) -> None:
    results = bench(tiny_folder("gpt2"), dataclasses.replace(quick, batch=(1, 2), repeats=1))
    lines = markdown(results).splitlines()
    assert lines[2].startswith("| mode | batch | context |")
    for label in ("dense-dynamic", "dense-static", "dense, in place", "gate 0.8, forced"):
        assert sum(line.startswith(f"| {label} | 2 | {CONTEXT} |") for line in lines) >= 1
    assert "survival forced at random" in lines[-1]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(rich_table(results))
    assert capture.get().count("gate 0.8, forced") == 4  # two batch sizes, two tables
    plot(results, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"mode": ["pruned"]}, "did you mean `modes`"),
        ({"modes": ["prund"]}, "did you mean `pruned`"),
        ({"modes": ["oracle"]}, "needs mode `pruned`"),
        ({"policy": "windw"}, "did you mean `window`"),
        ({"policy": "sink", "forced": True}, "the gate's, not that of `sink`"),
        ({"sparsity": [1.0]}, r"outside \[0, 1\)"),
        ({"batch": []}, "empty list"),
        ({"batch": [1.5]}, "whole numbers, not 1.5"),
        ({"batch": [float("inf")]}, "whole numbers, not inf"),
        ({"context": [8.0]}, "context must be at least 16"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"dtype": "int8"}, "unknown dtype"),
    ],
)
def test_bad_settings_are_refused(raw: dict[str, object], message: str) -> None:
    with pytest.raises(CtxpruneError, match=message):
        BenchConfig.from_mapping(raw, "the options")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forced": False}, "not tuned"),
        ({"max_rows": 20}, "a cap of 20 rows is too small"),
        ({"device": "abacus"}, "device `abacus` cannot be used"),
        ({"context": (2000,)}, "2000 and 12 decoded tokens need 2012 positions"),
        ({"architecture": "gpt3"}, "did you mean `gpt2`"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(
    tiny_folder: Make, quick: BenchConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CtxpruneError, match=message):
        bench(tiny_folder("gpt2"), dataclasses.replace(quick, **change))


def test_the_command(tiny_folder: Make, text_file: Path, tmp_path: Path) -> None:
    done = ctxprune(
        "bench", "--model", str(tiny_folder("gpt2")), "--batch", "1,2", "--context", "64",
        "--sparsity", "0,0.5", "--forced", "--prefills", "1", "--repeats", "1", "--steps", "2",
        "--text", str(text_file), "--json", "out/r.json", "--plot", "out/r.png", cwd=tmp_path,
    )  # fmt: skip
    assert "gate" in done.stdout and "batch 2, context 64: decoding 1 of 1" in done.stderr
    results = json.loads((tmp_path / "out" / "r.json").read_text())
    assert len(results["rows"]) == 10 and results["command"].startswith("main.py bench")
    assert (tmp_path / "out" / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", ".", "--modes", "pruned,orcle"], "did you mean `oracle`"),
        (["--model", ".", "--architecture", "gpt2"], "exclude each other"),
        (["--plot", "."], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = ctxprune("bench", *arguments, cwd=tmp_path, code=2)
    assert message in done.stderr and done.stdout == ""


def test_a_step_of_tuning_beside_a_dense_one(
    tiny_folder: Callable[[str], Path],
) -> None:
    events: list[str] = []
    config = TrainingCostConfig(context=(32, 64), repeats=2, train="lora")
    results = training_cost(tiny_folder("llama"), config, on_event=events.append)
    rows = results["rows"]
    assert [(row["context"], row["mode"]) for row in rows] == [
        (context, mode) for context in (32, 64) for mode in (DENSE, GATED, DISTILLED, LOCAL)
    ]
    assert events == [f"context {row['context']}: {row['mode']}" for row in rows]
    for row in rows:
        assert 0 < row["step_s"]["min"] <= row["step_s"]["median"] <= row["step_s"]["max"]
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
    assert rows[0]["ratio"] == rows[4]["ratio"] == 1.0
