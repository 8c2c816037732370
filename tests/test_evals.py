"""Perplexity, and the resumable loop over levels."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ctxprune.evals import evaluate as evaluate_module
from ctxprune.evals.evaluate import EvalConfig, evaluate
from ctxprune.evals.perplexity import perplexity
from ctxprune.pruner.checkpoint import load
from ctxprune.pruner.errors import CtxpruneError

CONTEXT = 48


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The captain walked along the shore and counted all of the boats again. " * 40)
    return path


@pytest.fixture
def config(text: Path) -> EvalConfig:
    return EvalConfig(
        sparsity=(0.0, 0.5), policy="sink", text=str(text), context=CONTEXT, tokens=4 * CONTEXT
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_the_naive_cross_entropy(
    tiny_folder: Callable[[str], Path], batch_size: int
) -> None:
    model = load(tiny_folder("gpt2"), sparsity=0.0)
    windows = torch.randint(0, model.config.vocab_size, (4, 20))
    nll = 0.0
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0].double()
            for position in range(19):
                nll -= logits[position].log_softmax(-1)[window[position + 1]].item()
    result = perplexity(model, windows, batch_size)
    assert result.tokens == 4 * 19
    assert result.perplexity == pytest.approx(math.exp(nll / result.tokens), rel=1e-5)
    assert result.sparsity == result.cache_sparsity == 0.0


def test_perplexity_reports_progress_and_refuses_no_text(
    tiny_folder: Callable[[str], Path],
) -> None:
    model = load(tiny_folder("gpt2"), sparsity=0.0)
    seen: list[tuple[int, int]] = []
    ids = torch.ones(3, 8, dtype=torch.int64)
    perplexity(model, ids, 2, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    with pytest.raises(CtxpruneError, match="too short"):
        perplexity(model, ids[:0])


def test_every_level_is_measured(tiny_folder: Callable[[str], Path], config: EvalConfig) -> None:
    result = evaluate(tiny_folder("llama"), config)
    dense, pruned = result["levels"]
    assert (dense["sparsity_requested"], dense["sparsity"]) == (0.0, 0.0)
    assert pruned["sparsity_requested"] == 0.5
    assert 0.3 < pruned["sparsity"] < 0.7
    assert pruned["cache_sparsity"] > 0.0
    assert dense["tokens"] == pruned["tokens"] == 4 * (CONTEXT - 1)
    assert dense["perplexity"] != pruned["perplexity"]
    assert result["policy"] == "sink"
    json.dumps(result)


def test_finished_measurements_are_not_repeated(
    tiny_folder: Callable[[str], Path],
    config: EvalConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, state = tiny_folder("gpt2"), tmp_path / "state" / "eval.json"
    real, calls = perplexity, []

    def killed_on_second(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate_module, "perplexity", killed_on_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, config, state=state)
    lines: list[str] = []
    resumed = evaluate(folder, config, state=state, on_event=lines.append)
    assert len(calls) == 3  # level 0 once, level 0.5 killed and repeated
    assert "perplexity at sparsity 0: already done, kept" in lines
    assert resumed["levels"] == evaluate(folder, config)["levels"]


def test_a_task_added_later_is_run_alone(
    tiny_folder: Callable[[str], Path], config: EvalConfig, tmp_path: Path
) -> None:
    row = {"goal": "How to cross the bay in winter?", "sol1": "sail", "sol2": "swim", "label": 0}
    (tmp_path / "piqa.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    folder, state = tiny_folder("gpt2"), tmp_path / "eval.json"
    config = dataclasses.replace(config, data_dir=tmp_path)
    evaluate(folder, config, state=state)
    lines: list[str] = []
    config = dataclasses.replace(config, tasks=("piqa",))
    result = evaluate(folder, config, state=state, on_event=lines.append)
    assert [line for line in lines if line.endswith(": running")] == [
        "piqa at sparsity 0: running",
        "piqa at sparsity 0.5: running",
    ]
    dense, pruned = (level["tasks"]["piqa"] for level in result["levels"])
    assert dense.keys() == pruned.keys() == {"acc", "acc_norm", "stderr", "sparsity", "capped", "n"}
    assert dense["sparsity"] == 0.0 < pruned["sparsity"]
    assert dense["n"] == 2


def test_a_changed_question_is_measured_anew(
    tiny_folder: Callable[[str], Path], config: EvalConfig, text: Path, tmp_path: Path
) -> None:
    folder, state = tiny_folder("gpt2"), tmp_path / "eval.json"
    before = evaluate(folder, config, state=state)
    text.write_text("Nothing of the kind was ever seen in this town before the war. " * 40)
    after = evaluate(folder, config, state=state)
    assert before["levels"][0]["perplexity"] != after["levels"][0]["perplexity"]


def test_a_level_without_eviction_is_refused(
    tiny_folder: Callable[[str], Path], config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the engine did not reach the model: every level would repeat the dense figure.
    monkeypatch.setattr("ctxprune.pruner.engine.Handle.use", lambda *args, **kwargs: None)
    with pytest.raises(CtxpruneError, match="not one token was evicted at sparsity 0.5"):
        evaluate(tiny_folder("gpt2"), config)


def test_a_broken_state_file_is_named(
    tiny_folder: Callable[[str], Path], config: EvalConfig, tmp_path: Path
) -> None:
    state = tmp_path / "eval.json"
    state.write_text("{")
    with pytest.raises(CtxpruneError, match="not a state file"):
        evaluate(tiny_folder("gpt2"), config, state=state)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"task": ["piqa"]}, "did you mean `tasks`"),
        ({"policy": "windw"}, "did you mean `window`"),
        ({"sparsity": [1.0]}, r"outside \[0, 1\)"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"dtype": "int8"}, "unknown dtype"),
    ],
)
def test_bad_settings_are_refused(raw: dict[str, object], message: str) -> None:
    with pytest.raises(CtxpruneError, match=message):
        EvalConfig.from_mapping(raw, "recipe.yaml")
