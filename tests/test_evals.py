"""Perplexity, and the resumable loop over levels."""

import dataclasses
import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxprune.evals import state as state_module
from ctxprune.evals.config import EvalConfig
from ctxprune.evals.quality import evaluate as evaluate_module
from ctxprune.evals.quality import last_word, long_context
from ctxprune.evals.quality import tasks as tasks_module
from ctxprune.evals.quality.accuracy import against
from ctxprune.evals.quality.evaluate import evaluate
from ctxprune.evals.quality.perplexity import perplexity
from ctxprune.pruner.checkpoints.checkpoint import load, load_tokenizer
from ctxprune.pruner.data import read_texts
from ctxprune.pruner.errors import CtxpruneError, Interrupted

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


def test_no_text_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("gpt2"), sparsity=0.0)
    ids = torch.ones(3, 8, dtype=torch.int64)
    for windows, prompt in ((ids[:0], 1), (ids, 8)):
        with pytest.raises(CtxpruneError, match="too short"):
            perplexity(model, windows, prompt=prompt)


@torch.no_grad()
@pytest.mark.parametrize("evict", ["reading", "prompt"])
def test_a_prompt_is_read_and_the_rest_is_scored(
    tiny_folder: Callable[[str], Path], evict: str
) -> None:
    model = load(tiny_folder("llama"), sparsity=0.0)
    windows = torch.randint(1, model.config.vocab_size, (3, 96))
    model.ctxprune.use("sink", 0.7, context=96, prompt=63, evict=evict)
    nll = 0.0
    for window in windows:
        # The prompt but for its last token, then one token after the other.
        cache = model.ctxprune.cache()
        model(window[None, :63], past_key_values=cache)
        for position in range(63, 95):
            logits = model(window[None, position : position + 1], past_key_values=cache).logits
            nll -= logits[0, -1].double().log_softmax(-1)[window[position + 1]].item()
        model(window[None, 95:], past_key_values=cache)
    found = perplexity(model, windows, 2, 64)
    assert found.tokens == 3 * 32
    assert found.perplexity == pytest.approx(math.exp(nll / found.tokens), rel=1e-4)
    assert found.rows == pytest.approx(cache.rows)
    model.ctxprune.use(sparsity=0.0)
    assert perplexity(model, windows, 2, 64).perplexity != pytest.approx(found.perplexity, rel=1e-3)


@pytest.mark.parametrize("policy", ["gate", "tova", "window"])
@pytest.mark.parametrize("evict", ["reading", "prompt"])
def test_perplexity_does_not_depend_on_the_batch(
    embedded_folder: Path, policy: str, evict: str
) -> None:
    model = load(embedded_folder, sparsity=0.0, dtype="float64")
    handle = model.ctxprune
    handle.config = dataclasses.replace(handle.config, levels={0.8: (0.2,) * len(handle.gates)})
    windows = torch.randint(1, model.config.vocab_size, (5, 120))
    handle.use(policy, 0.8, context=120, prompt=79, evict=evict)
    alone, some = (perplexity(model, windows, size, 80) for size in (1, 3))
    for name, value in dataclasses.asdict(alone).items():
        assert getattr(some, name) == pytest.approx(value, rel=1e-9), name
    assert alone.rows is not None and 0 < alone.rows < 60


def test_both_protocols_hold_as_many_rows(
    tiny_folder: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    folder, state = tiny_folder("gpt2"), tmp_path / "eval.json"
    config = EvalConfig(
        sparsity=(0.0, 0.7), policy="h2o", text=str(text), context=96, prompt=64, tokens=4 * 96
    )
    reading = evaluate(folder, config, state=state)
    lines: list[str] = []
    late = dataclasses.replace(config, evict="prompt")
    after = evaluate(folder, late, state=state, on_event=lines.append)
    assert "perplexity at sparsity 0.7: running" in lines
    assert (reading["evict"], after["evict"]) == ("reading", "prompt")
    assert reading["prompt"] == after["prompt"] == 64
    (dense, early), (other, pruned) = reading["levels"], after["levels"]
    assert dense["rows"] is None and dense["tokens"] == 4 * 32
    assert dense["perplexity"] == other["perplexity"] != pruned["perplexity"]
    assert early["rows"] == pytest.approx(pruned["rows"], abs=8)  # an eviction interval
    assert early["sparsity"] == pytest.approx(0.7, abs=0.03)
    assert 0.0 < pruned["sparsity"] < early["sparsity"]
    assert early["cache_sparsity"] == pytest.approx(pruned["cache_sparsity"], abs=0.1)
    other_prompt = dataclasses.replace(config, prompt=48)
    assert evaluate(folder, other_prompt, state=state)["levels"][0]["tokens"] == 4 * 48


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
    assert result["machine"] and result["threads"] == torch.get_num_threads()
    json.dumps(result)


def test_batches_are_the_default_and_change_no_figure(
    embedded_folder: Path, own: EvalConfig
) -> None:
    config = dataclasses.replace(own, tokens=10 * CONTEXT, limit=5, dtype="float64")
    assert config.batch_size == 8
    several = evaluate(embedded_folder, config)["levels"]
    alone = evaluate(embedded_folder, dataclasses.replace(config, batch_size=1))["levels"]
    for one, other in zip(alone, several, strict=True):
        for figures, same in (
            (one, other),
            (one["tasks"]["last_word"], other["tasks"]["last_word"]),
        ):
            numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
            assert {k: same[k] for k in numbers} == pytest.approx(numbers, rel=1e-9)


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
    with pytest.raises(Interrupted):
        evaluate(folder, config, state=state)
    lines: list[str] = []
    resumed = evaluate(folder, config, state=state, on_event=lines.append)
    assert len(calls) == 3  # level 0 once, level 0.5 killed and repeated
    assert "perplexity at sparsity 0: already done, kept (" in "\n".join(lines)
    assert undated(resumed["levels"]) == undated(evaluate(folder, config)["levels"])


BOTH = ["perplexity at sparsity 0", "perplexity at sparsity 0.5"]
PRUNED = BOTH[1:]


@pytest.mark.parametrize(
    ("changed", "anew"),
    [
        ("nothing", []),
        ("policies/sink.py", PRUNED),  # the policy that decides
        ("policies/h2o.py", []),  # another
        ("policies/__init__.py", BOTH),
        ("engine/evict.py", BOTH),
        ("rows.py", BOTH),
        ("ctxprune", BOTH),
        ("torch", BOTH),
        ("transformers", BOTH),
        ("lm_eval", BOTH),
        ("--fresh", BOTH),
    ],
)
def test_what_a_number_depends_on_is_measured_anew_if_it_changes(
    tiny_folder: Callable[[str], Path],
    config: EvalConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
    anew: list[str],
) -> None:
    sources, state, folder = tmp_path / "pruner", tmp_path / "eval.json", tiny_folder("gpt2")
    shutil.copytree(state_module.PRUNER, sources)
    monkeypatch.setattr(state_module, "PRUNER", sources)
    assert running(folder, config, state) == BOTH
    version = importlib.metadata.version
    if changed.endswith(".py"):
        with (sources / changed).open("a") as file:
            file.write("# its sign was flipped\n")
    else:
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "99" if name == changed else version(name)
        )
    assert running(folder, config, state, fresh=changed == "--fresh") == anew
    assert running(folder, config, state) == []


def test_a_number_that_is_kept_keeps_its_date(
    tiny_folder: Callable[[str], Path], config: EvalConfig, tmp_path: Path
) -> None:
    folder, state = tiny_folder("gpt2"), tmp_path / "eval.json"
    first = evaluate(folder, config, state=state)
    kept = json.loads(state.read_text())
    for entry in kept.values():
        entry["date"] = "2020-02-29T12:00:00+00:00"
    state.write_text(json.dumps(kept))
    lines: list[str] = []
    again = evaluate(folder, config, state=state, on_event=lines.append)
    assert "perplexity at sparsity 0: already done, kept (2020-02-29)" in lines
    assert {level["date"][:4] for level in again["levels"]} == {"2020"} != {again["date"][:4]}
    assert undated(again["levels"]) == undated(first["levels"])


def test_a_dense_model_is_measured_once_whoever_would_decide(
    tiny_folder: Callable[[str], Path], config: EvalConfig, tmp_path: Path
) -> None:
    folder, state = tiny_folder("gpt2"), tmp_path / "eval.json"
    assert running(folder, config, state) == BOTH
    other = dataclasses.replace(config, policy="window")
    assert running(folder, other, state) == PRUNED
    capped = dataclasses.replace(config, policy="window", max_rows=40)  # evicts at 0 too
    assert running(folder, capped, state) == BOTH


def test_a_difference_to_the_dense_model_is_that_of_the_same_documents(
    embedded_folder: Path, own: EvalConfig, task_folder: Path
) -> None:
    config = dataclasses.replace(
        own, tasks=("piqa", "last_word"), data_dir=task_folder, limit=6, tokens=4 * CONTEXT
    )
    dense, pruned = evaluate(embedded_folder, config)["levels"]
    assert "against_dense" not in dense
    assert "against_dense" not in dense["tasks"]["piqa"]
    paired = pruned["against_dense"]["nll"]
    ratio = pruned["perplexity"] / dense["perplexity"]
    assert paired["difference"] == pytest.approx(math.log(ratio))
    # windows of a text differ more from each other than two models on one window do
    assert 0 < paired["stderr"] < pruned["perplexity_stderr"] / pruned["perplexity"]
    for name, metrics in (("piqa", {"acc", "acc_norm"}), ("last_word", {"acc"})):
        found = pruned["tasks"][name]["against_dense"]
        assert found.keys() == metrics
        for metric, of in found.items():
            apart = pruned["tasks"][name][metric] - dense["tasks"][name][metric]
            assert of["difference"] == pytest.approx(apart)
    alone = dataclasses.replace(config, sparsity=(0.5,))
    assert "against_dense" not in evaluate(embedded_folder, alone)["levels"][0]


@pytest.mark.parametrize(
    ("own", "dense", "difference", "stderr"),
    [
        ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], 0.0, 0.0),
        ([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], 0.25, 0.25),
        ([3.0, 5.0], [1.0, 1.0], 3.0, 1.0),
        ([2.0], [1.0], 1.0, None),
    ],
)
def test_differences_are_paired(
    own: list[float], dense: list[float], difference: float, stderr: float | None
) -> None:
    found = against({"acc": own, "other": own}, {"acc": dense, "other": [*dense, 0.0]})
    assert found.keys() == {"acc"}
    assert found["acc"]["difference"] == pytest.approx(difference)
    assert found["acc"].get("stderr") == (None if stderr is None else pytest.approx(stderr))


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
    assert dense.keys() == {
        *("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "stderr"),
        *("sparsity", "rows", "cache_sparsity", "capped", "n", "documents", "shots", "date"),
    }
    assert pruned.keys() == {*dense, "against_dense"}
    assert pruned["against_dense"].keys() == {"acc", "acc_norm"}
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
    monkeypatch.setattr("ctxprune.pruner.engine.handle.Handle.use", lambda *args, **kwargs: None)
    with pytest.raises(CtxpruneError, match="not one token was evicted at sparsity 0.5"):
        evaluate(tiny_folder("gpt2"), config)


def test_a_broken_state_file_is_named(
    tiny_folder: Callable[[str], Path], config: EvalConfig, tmp_path: Path
) -> None:
    state = tmp_path / "eval.json"
    state.write_text("{")
    with pytest.raises(CtxpruneError, match="eval.json` cannot be read as JSON"):
        evaluate(tiny_folder("gpt2"), config, state=state)


@pytest.fixture
def own(tmp_path: Path) -> EvalConfig:
    """Our own tasks, on a document of a few thousand tokens."""
    path = tmp_path / "book.txt"
    path.write_text(read_texts(None, "eval")[3])
    return EvalConfig(
        tasks=("last_word", "retrieval"),
        sparsity=(0.0, 0.5),
        policy="sink",
        text=str(path),
        context=CONTEXT,
        tokens=CONTEXT,
        lengths=(256, 128),
        limit=2,
        seed=3,
    )


def undated(levels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in level.items() if name != "date"} for level in levels]


def running(folder: Path, config: EvalConfig, state: Path, *, fresh: bool = False) -> list[str]:
    """What an evaluation says that it measures anew."""
    lines: list[str] = []
    evaluate(folder, config, state=state, fresh=fresh, on_event=lines.append)
    return [line.removesuffix(": running") for line in lines if line.endswith(": running")]


def test_our_own_tasks_are_measured_at_every_level(
    embedded_folder: Path, own: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without one look at lm-eval's tasks
    monkeypatch.setattr(tasks_module, "TaskManager", None)
    result = evaluate(embedded_folder, own)
    model, tokenizer = load(embedded_folder), load_tokenizer(embedded_folder)
    texts = read_texts(own.text)
    prompts = long_context.prompts(
        "retrieval", tokenizer, texts, lengths=(128, 256), per_cell=2, seed=3
    )
    passages = last_word.passages(tokenizer, texts, limit=2, seed=3)
    for level in result["levels"]:
        at = {"policy": "sink", "sparsity": level["sparsity_requested"]}
        alone = {
            "retrieval": long_context.score("retrieval", model, prompts, **at),
            "last_word": last_word.score(model, passages, **at, batch_size=8),
        }
        for name, figures in alone.items():
            assert len(figures.pop("values")["acc"]) == figures["n"]
            assert figures.items() <= level["tasks"][name].items()
    dense, pruned = (level["tasks"] for level in result["levels"])
    assert dense["retrieval"]["sparsity"] == dense["last_word"]["sparsity"] == 0.0
    assert dense["retrieval"]["cells"][-1]["length"] == 256
    assert pruned["retrieval"]["sparsity"] > 0.3 < pruned["last_word"]["sparsity"]
    json.dumps(result)


def test_our_own_tasks_are_measured_anew_if_their_question_changed(
    embedded_folder: Path, own: EvalConfig, tmp_path: Path, text: Path
) -> None:
    state = tmp_path / "eval.json"
    config = dataclasses.replace(own, sparsity=(0.5,), limit=1, lengths=(128,))
    perplexity, ours = ["perplexity at sparsity 0.5"], ["retrieval at sparsity 0.5"]
    both = [*ours, "last_word at sparsity 0.5"]
    assert running(embedded_folder, config, state) == [*perplexity, *both]
    assert running(embedded_folder, config, state) == []
    config = dataclasses.replace(config, lengths=(128, 192))
    assert running(embedded_folder, config, state) == ours
    config = dataclasses.replace(config, limit=2)
    assert running(embedded_folder, config, state) == both
    config = dataclasses.replace(config, seed=4)
    assert running(embedded_folder, config, state) == [*perplexity, *both]
    text.write_text("The captain saw the other captain. " * 200)
    config = dataclasses.replace(config, text=str(text))
    assert running(embedded_folder, config, state) == [*perplexity, *both]
    text.write_text("The captain saw the other captain. " * 201)
    assert running(embedded_folder, config, state) == [*perplexity, *both]


def test_our_own_tasks_run_beside_those_of_lm_eval(
    embedded_folder: Path, own: EvalConfig, task_folder: Path
) -> None:
    config = dataclasses.replace(
        own, tasks=("piqa", "last_word"), data_dir=task_folder, sparsity=(0.5,)
    )
    (level,) = evaluate(embedded_folder, config)["levels"]
    assert set(level["tasks"]) == {"piqa", "last_word"}
    assert level["tasks"]["piqa"]["n"] == level["tasks"]["last_word"]["n"] == 2


def test_lengths_beyond_the_positions_of_the_model_are_said_to_be_left_out(
    embedded_folder: Path, own: EvalConfig
) -> None:
    lines: list[str] = []
    config = dataclasses.replace(
        own, tasks=("retrieval",), lengths=(128, 1024, 2048), limit=1, sparsity=(0.0,)
    )
    result = evaluate(embedded_folder, config, on_event=lines.append)
    cells = result["levels"][0]["tasks"]["retrieval"]["cells"]
    assert {cell["length"] for cell in cells} == {128, 1024}
    assert "retrieval: length 2048 cannot be served" in lines


@pytest.mark.parametrize(
    ("name", "meant"), [("retreival", "retrieval"), ("lastword", "last_word"), ("piqaa", "piqa")]
)
def test_unknown_tasks_name_the_nearest_of_ours_too(
    embedded_folder: Path, own: EvalConfig, name: str, meant: str
) -> None:
    with pytest.raises(CtxpruneError, match=f"unknown task `{name}`, did you mean `{meant}`"):
        evaluate(embedded_folder, dataclasses.replace(own, tasks=(name,)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"task": ["piqa"]}, "did you mean `tasks`"),
        ({"policy": "windw"}, "did you mean `window`"),
        ({"sparsity": [1.0]}, "less than 1"),
        ({"batch_size": "autoo"}, "unknown value of batch_size `autoo`, did you mean `auto`"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0"),
        ({"gen_kwargs": "hot"}, "`hot` is no list of settings"),
        ({"gen_kwargs": ["hot"]}, "gen_kwargs must be a mapping"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"lengths": [64]}, "lengths must be at least 128"),
        ({"lengths": [1024.5]}, "lengths must be a whole number"),
        ({"lengths": []}, "lengths must not be an empty list"),
        ({"lengths": 1024}, "lengths must be a list, not 1024"),
        ({"evict": "promt"}, "did you mean `prompt`"),
        ({"evict": "prompt"}, "need one in the windows of perplexity"),
        ({"context": 64, "prompt": 64}, "context must be at least 65"),
    ],
)
def test_bad_settings_are_refused(raw: dict[str, object], message: str) -> None:
    with pytest.raises(CtxpruneError, match=message):
        EvalConfig.from_mapping(raw, "recipe.yaml")
