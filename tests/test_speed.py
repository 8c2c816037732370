"""The benchmark: what it holds, compares and reports. Its timings decide nothing here."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from rich.console import Console
from test_cli import ctxprune
from transformers import StaticCache

from ctxprune.evals.config import BenchConfig
from ctxprune.evals.results import MODES, Benchmark, measured, typed
from ctxprune.evals.speed.bench import bench
from ctxprune.evals.speed.breakdown import RANGES
from ctxprune.evals.speed.comparison import (
    Comparison,
    PlainLayer,
    attended,
    eviction_steps,
    kv_bytes,
)
from ctxprune.evals.speed.speed_report import markdown, plot, rich_table
from ctxprune.evals.speed.subject import prompts, unequal
from ctxprune.evals.speed.training_cost import (
    DENSE,
    DISTILLED,
    GATED,
    LOCAL,
    TrainingCostConfig,
    training_cost,
)
from ctxprune.pruner import device
from ctxprune.pruner.checkpoints.checkpoint import load
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.dense import DenseCache, DenseLayer
from ctxprune.pruner.errors import CtxpruneError, Interrupted
from ctxprune.pruner.rows import Plan, Rows

Make = Callable[[str], Path]
CONTEXT = 96
QUICK = BenchConfig(
    batch=(2,), context=(CONTEXT,), sparsity=(0.0, 0.8), repeats=2, steps=3, prefills=1
)


@pytest.fixture
def quick(text_file: Path) -> BenchConfig:
    return dataclasses.replace(QUICK, text=str(text_file))


@pytest.fixture
def tuned(tiny_folder: Make) -> Make:
    """Make the folder of a tiny model that counts as tuned: its layers hold unlike many rows."""

    def make(family: str) -> Path:
        folder = tiny_folder(family)
        settings = json.loads((folder / "ctxprune.json").read_text())
        settings["config"]["levels"] = {"0.8": [0.3, 0.2, 0.1]}
        (folder / "ctxprune.json").write_text(json.dumps(settings))
        return folder

    return make


def by_mode(results: dict[str, Any]) -> dict[tuple[str, float], dict[str, Any]]:
    return {(row["mode"], row["sparsity"]): row for row in results["rows"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_is_measured(family: str, tuned: Make, quick: BenchConfig) -> None:
    results = bench(tuned(family), quick)
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
        assert row["dtype"] == "float32" and not row["compiled"]
        assert 0 < row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"]
        assert row["decode_tokens_per_s"] == pytest.approx(2e3 / row["step_ms"]["median"])
        if row["mode"] != "oracle":
            assert 0 < row["prefill_s"]["median"] <= row["ttft_s"]
            assert row["peak_bytes"] is None or row["peak_bytes"] > row["kv_bytes"]
    assert max(rows[mode, 0.0]["speedup"] for mode in MODES[:2]) == 1.0
    assert min(rows[mode, 0.0]["ttft_ratio"]["median"] for mode in MODES[:2]) == 1.0
    dense, pruned, oracle = rows["dense-dynamic", 0.0], rows["pruned", 0.8], rows["oracle", 0.8]
    assert dense["kv_bytes"] < rows["dense-static", 0.0]["kv_bytes"]
    assert oracle["kv_bytes"] < pruned["kv_bytes"] < dense["kv_bytes"]
    assert pruned["cache_sparsity"] == pytest.approx(0.8, abs=0.1)
    assert pruned["sparsity_realised"] == pytest.approx(0.8, abs=0.005)
    assert oracle["rows_kept"] == pytest.approx(pruned["rows_kept"])
    assert oracle["rows_kept"] < CONTEXT / 3
    assert pruned["of_oracle"] == pytest.approx(
        pruned["decode_tokens_per_s"] / oracle["decode_tokens_per_s"]
    )
    # One prefill: the ratio is that of the two times.
    best = min(rows[mode, 0.0]["ttft_s"] for mode in MODES[:2])
    assert pruned["ttft_ratio"]["median"] == pytest.approx(pruned["ttft_s"] / best)
    # Only where rows leave is there a time at which they do not.
    assert [mode for mode, row in rows.items() if row["interval"]] == [("pruned", 0.8)]
    assert 1 < pruned["interval"]["min"] <= pruned["interval"]["max"] == results["evicts_every"]
    assert results["steps"] % results["evicts_every"] == 0 and results["steps"] >= quick.steps
    added = pruned["between_ms"] + pruned["eviction_ms"]
    assert 0 < pruned["between_ms"] and added == pytest.approx(pruned["step_ms"]["median"])
    assert dense["between_ms"] is None and oracle["ttft_ratio"] is None
    assert [mode for mode, row in rows.items() if "breakdown" in row] == [("pruned", 0.8)]
    parts = pruned["breakdown"]
    assert list(parts) == [*RANGES, "rest"] and min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(pruned["step_ms"]["median"])
    assert not results["random_weights"]
    assert isinstance(typed("r.json", json.loads(json.dumps(results))), Benchmark)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modes_do_the_work_they_are_named_for(
    family: str, tuned: Make, quick: BenchConfig
) -> None:
    model = load(tuned(family), sparsity=0.0)
    ids = torch.randint(0, model.config.vocab_size, (2, CONTEXT))
    steps = 10  # more than those after which an oracle goes back
    comparison = Comparison(model, quick, ids, steps, lambda line: None)
    rows = comparison.measure()
    dynamic, static, in_place, pruned, oracle = comparison.lanes
    read = CONTEXT + steps * (quick.repeats + 1)
    for lane, row in zip(comparison.lanes, rows, strict=True):
        assert lane.cache is not None
        assert lane.decoded == read - CONTEXT + steps * (lane is pruned)
        if lane is not oracle:
            assert int(lane.cache.get_seq_length()) == CONTEXT + lane.decoded
            assert row["kv_bytes"] <= kv_bytes(lane.cache)
    assert isinstance(static.cache, StaticCache) and static.cache.get_max_length() == read
    # The baseline keeps transformers' own layers, which the engine would replace.
    assert dynamic.cache is not None and in_place.cache is not None
    assert {type(layer) for layer in dynamic.cache.layers} == {PlainLayer}
    assert {type(layer) for layer in in_place.cache.layers} == {DenseLayer}
    # Dense is dense, whichever cache it has.
    assert dynamic.token is not None and static.token is not None and in_place.token is not None
    assert dynamic.token.equal(static.token) and dynamic.token.equal(in_place.token)
    assert isinstance(pruned.cache, PrunedCache)
    counted = sum(
        tensor.nbytes
        for page in pruned.cache.pages
        for value in vars(page).values()
        for tensor in (value.values() if isinstance(value, dict) else [value])
        if isinstance(tensor, torch.Tensor)
    )
    assert kv_bytes(pruned.cache) == counted
    # An oracle attends to as many rows as were, on the mean of its steps before it goes back.
    assert isinstance(oracle.cache, DenseCache)
    begin = oracle.cache.get_seq_length() - steps % 8
    assert begin + 4.5 == pytest.approx(attended(pruned.cache), abs=0.5)


def test_what_a_token_attends_to_is_counted_over_whole_intervals(
    tuned: Make, quick: BenchConfig
) -> None:
    model = load(tuned("llama"), sparsity=0.0)
    ids = torch.randint(0, model.config.vocab_size, (2, CONTEXT))
    comparison = Comparison(model, quick, ids, 4, lambda line: None)
    comparison._prefill(comparison.lanes[3])
    cache = comparison.lanes[3].cache
    assert isinstance(cache, PrunedCache) and cache.policy.rows is not None
    longest, rows = cache.policy.rows.longest, []
    for _ in range(longest):
        rows.append(cache.rows + 1)
        comparison._decode(comparison.lanes[3], 1)
    assert sum(rows) / longest == pytest.approx(attended(cache))


def test_eviction_steps_are_those_at_which_a_sequence_of_a_layer_has_one() -> None:
    rows = Rows([Plan((2, 8), ((4,), (4,))), Plan((4, 8), ((4,), (4,)))])
    assert eviction_steps(rows, 2, [8, 9], 4) == [False, True, True, True]
    assert eviction_steps(rows, 2, [10, 10], 3) == [False, True, False]


def test_a_burst_has_whole_eviction_intervals() -> None:
    assert [BenchConfig().burst(interval) for interval in (0, 1, 8, 32, 64)] == [32, 32, 32, 32, 64]
    assert BenchConfig(steps=65).burst(64) == 128


def test_a_cap_on_rows_prunes_alone(tiny_folder: Make, quick: BenchConfig) -> None:
    config = dataclasses.replace(
        quick, policy="sink", max_rows=48, sparsity=(0.0,), modes=("pruned",)
    )
    results = bench(tiny_folder("gpt2"), config)
    (row,) = results["rows"]
    assert results["max_rows"] == 48 and row["rows_kept"] <= 48
    assert row["speedup"] is None and row["of_oracle"] is None and "breakdown" in row
    assert row["ttft_ratio"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_unequal_lengths(family: str, tuned: Make, quick: BenchConfig) -> None:
    model = load(tuned(family), sparsity=0.0)
    config = dataclasses.replace(quick, batch=(3,), unequal=True, repeats=1)
    ids = torch.randint(0, model.config.vocab_size, (3, CONTEXT))
    comparison = Comparison(model, config, ids, 8, lambda line: None)
    rows = comparison.measure()
    lengths = [CONTEXT // 2, CONTEXT * 3 // 4, CONTEXT]
    dynamic, static, in_place, pruned, _ = comparison.lanes
    assert isinstance(pruned.cache, PrunedCache)
    assert pruned.cache.seen == [length + pruned.decoded for length in lengths]
    assert rows[3]["sparsity_realised"] == pytest.approx(0.8, abs=0.01)
    assert rows[0]["prefill_tokens_per_s"] == pytest.approx(
        sum(lengths) / rows[0]["prefill_s"]["median"]
    )
    # Each writes what it writes alone.
    assert dynamic.token is not None and static.token is not None and in_place.token is not None
    assert dynamic.token.equal(static.token) and dynamic.token.equal(in_place.token)
    single = dataclasses.replace(quick, batch=(1,), repeats=1, modes=("dense-static",))
    for length, prompt, token in zip(lengths, ids, dynamic.token, strict=True):
        alone = Comparison(model, single, prompt[None, -length:], 8, lambda line: None)
        alone.measure()
        assert alone.lanes[0].token is not None and alone.lanes[0].token[0].equal(token)


def test_lengths_are_spread_from_half_to_all() -> None:
    assert unequal(1, 100) == [100]
    assert unequal(2, 101) == [50, 101]
    assert unequal(5, 1024) == [512, 640, 768, 896, 1024]


def test_rows_leave_after_the_prompt_alone(tuned: Make, quick: BenchConfig) -> None:
    config = dataclasses.replace(quick, evict="prompt", sparsity=(0.8,), modes=("pruned",))
    folder = tuned("llama")
    results = bench(folder, config)
    (row,) = results["rows"]
    assert results["evict"] == "prompt" and row["sparsity_realised"] == 0.0
    assert row["cache_sparsity"] == pytest.approx(0.8, abs=0.15)
    assert "| gate 0.8, after the prompt | 2 | 96 |" in markdown(measured(Benchmark, results))
    with pytest.raises(CtxpruneError, match="a prompt that is read whole breaks it"):
        bench(folder, dataclasses.replace(config, max_rows=48))


def test_dtypes_are_measured_one_after_the_other(
    tuned: Make, quick: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Abacus\nflags\t\t: fpu avx2 avx512f\n")
    monkeypatch.setattr(device, "CPUINFO", cpuinfo)
    config = dataclasses.replace(
        quick, dtype=("float32", "bfloat16"), modes=("dense-static", "pruned"), repeats=1
    )
    lines: list[str] = []
    folder = tuned("llama")
    results = bench(folder, config, on_event=lines.append)
    assert [row["dtype"] for row in results["rows"]] == ["float32"] * 3 + ["bfloat16"] * 3
    assert results["dtype"] == "float32, bfloat16" and results["extensions"] == ["AVX-512"]
    assert sum("emulates bfloat16" in line for line in lines) == 1
    static = [row for row in results["rows"] if row["mode"] == "dense-static"]
    assert static[0]["kv_bytes"] == 2 * static[1]["kv_bytes"]
    assert [row["speedup"] for row in static] == [1.0, 1.0]
    shown = markdown(measured(Benchmark, results))
    assert "| gate 0.8, bfloat16 | 2 |" in shown and "on Abacus (AVX-512)" in shown
    cpuinfo.write_text("flags\t\t: avx512f avx512_bf16\n")
    lines.clear()
    bench(folder, dataclasses.replace(config, dtype=("bfloat16",)), on_event=lines.append)
    assert not any("emulates" in line for line in lines)


def test_compiled_steps_are_measured_beside(
    tuned: Make, quick: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = dataclasses.replace(quick, compile=True, repeats=1)
    results = bench(tuned("llama"), config)
    rows = {(row["mode"], row["sparsity"], row["compiled"]): row for row in results["rows"]}
    compiled = [(mode, level) for mode, level, compiled in rows if compiled]
    assert compiled == [("dense-static", 0.0), ("pruned", 0.8)]
    # What is compiled is compared with the best of all, what is not with its like.
    dense = [(mode, 0.0, False) for mode in MODES[:2]]
    static, pruned = rows["dense-static", 0.0, True], rows["pruned", 0.8, True]
    paces = [rows[key]["decode_tokens_per_s"] for key in dense]
    best = max(*paces, static["decode_tokens_per_s"])
    assert pruned["speedup"] == pytest.approx(pruned["decode_tokens_per_s"] / best)
    assert max(rows[key]["speedup"] for key in dense) == 1.0
    assert pruned["of_oracle"] is None and "breakdown" not in pruned
    assert "| gate 0.8, compiled | 2 |" in markdown(measured(Benchmark, results))


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

    monkeypatch.setattr(Comparison, "measure", killed_on_second)
    with pytest.raises(Interrupted):
        bench(folder, config, state=state)
    lines: list[str] = []
    resumed = bench(folder, config, state=state, on_event=lines.append)
    assert lines[1] == "float32, batch 2, context 32: already done, kept"
    assert [row["context"] for row in resumed["rows"]] == [32, 48]
    # What was finished is measured anew.
    bench(folder, config, state=state)
    assert calls == [32, 48, 48, 32, 48]


def test_an_architecture_has_random_weights(tmp_path: Path) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(tiny_model("llama").config.to_json_string())
    config = dataclasses.replace(QUICK, architecture=str(shape), dtype=("bfloat16",))
    results = bench(None, config)
    assert results["random_weights"] and not results["positions_enlarged"]
    pruned = by_mode(results)["pruned", 0.8]
    # No layer is told from another, so all have the same interval.
    assert pruned["cache_sparsity"] > 0.7
    assert pruned["interval"]["min"] == pruned["interval"]["max"]
    bounded = tiny_model("gpt2").config
    bounded.max_position_embeddings = CONTEXT + 11
    shape.write_text(bounded.to_json_string())
    with pytest.raises(CtxpruneError, match="96 and 16 decoded tokens need 112 positions"):
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


def test_reports(tuned: Make, quick: BenchConfig, tmp_path: Path) -> None:
    results = bench(tuned("gpt2"), dataclasses.replace(quick, batch=(1, 2), repeats=1))
    lines = markdown(measured(Benchmark, results)).splitlines()
    assert lines[2].startswith("| mode | batch | context |")
    for label, times in (("dense-dynamic", 2), ("dense, in place", 2), ("oracle 0.8", 1)):
        assert sum(line.startswith(f"| {label} | 2 | {CONTEXT} |") for line in lines) == times
    every = results["evicts_every"]
    assert f"bursts of {results['steps']} steps" in lines[-1]
    assert f"evicts every {every} tokens at most" in lines[-1]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(rich_table(measured(Benchmark, results)))
    assert capture.get().count("gate 0.8") == 6  # two batch sizes, three tables
    for width in (80, 120):
        narrow = Console(width=width)
        with narrow.capture() as capture:
            narrow.print(rich_table(measured(Benchmark, results)))
        text = capture.get()
        assert "\u2026" not in text and max(map(len, text.splitlines())) <= width
        assert text.count("speedup") == text.count("interval ") == 1 and "compression_ratio" in text
    plot(measured(Benchmark, results), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"mode": ["pruned"]}, "did you mean `modes`"),
        ({"modes": ["prund"]}, "did you mean `pruned`"),
        ({"modes": ["oracle"]}, "needs mode `pruned`"),
        ({"policy": "windw"}, "did you mean `window`"),
        ({"evict": "promt"}, "did you mean `prompt`"),
        ({"compile": True, "unequal": True}, "without padding"),
        ({"sparsity": [1.0]}, "item 1 of sparsity must be less than 1, not 1.0"),
        ({"batch": []}, "empty list"),
        ({"batch": [1, 1.5]}, "item 2 of batch must be a whole number, not 1.5"),
        ({"batch": [float("inf")]}, "whole number, not inf"),
        ({"context": [8]}, "context must be at least 16"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"dtype": ["float32", "int8"]}, "unknown dtype"),
        ({"dtype": []}, "empty list"),
    ],
)
def test_bad_settings_are_refused(raw: dict[str, object], message: str) -> None:
    with pytest.raises(CtxpruneError, match=message):
        BenchConfig.from_mapping(raw, "the options")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "not tuned"),
        ({"max_rows": 20}, "a cap of 20 rows is too small"),
        ({"device": "abacus"}, "device `abacus` cannot be used"),
        ({"context": (2000,), "policy": "sink"}, "2000 and 16 decoded tokens need 2016 positions"),
        ({"architecture": "gpt_2"}, "did you mean `gpt2`"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(
    tiny_folder: Make, quick: BenchConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CtxpruneError, match=message):
        bench(tiny_folder("gpt2"), dataclasses.replace(quick, **change))


def test_the_command(tiny_folder: Make, text_file: Path, tmp_path: Path) -> None:
    done = ctxprune(
        "bench", "--model", str(tiny_folder("gpt2")), "--batch-size", "1,2", "--context", "64",
        "--sparsity", "0,0.5", "--policy", "window", "--dtype", "float32,float64",
        "--prefills", "1", "--repeats", "1", "--steps", "2", "--text", str(text_file),
        "--out", "out/r.json", "--plot", "out/r.png", cwd=tmp_path,
    )  # fmt: skip
    told = "float64, batch 2, context 64: decoding 1 of 1"
    assert "window" in done.stdout and told in done.stderr
    results = json.loads((tmp_path / "out" / "r.json").read_text())
    assert len(results["rows"]) == 20 and results["command"].startswith("main.py bench")
    assert (tmp_path / "out" / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", ".", "--modes", "pruned,orcle"], "did you mean `oracle`"),
        (["--model", ".", "--architecture", "gpt2"], "exclude each other"),
        (["--plot", "."], "cannot be written"),
        (["--training", "--dtype", "float32"], "`--dtype` is nothing to steps of tuning"),
        (["--training", "--plot", "a.png"], "`--plot` is nothing to steps of tuning"),
        (["--training", "--batch-size", "1,2"], "measured at one batch size"),
        (["--training", "--train", "gates"], "a dense step trains no gates"),
        (["--bf16"], "`--bf16` is nothing to prefill and decoding"),
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
    assert events[1:] == [f"context {row['context']}: {row['mode']}" for row in rows]
    for row in rows:
        assert 0 < row["step_s"]["min"] <= row["step_s"]["median"] <= row["step_s"]["max"]
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
    assert rows[0]["ratio"] == rows[4]["ratio"] == 1.0
