"""Recipes: the shipped ones parse, mistakes are named before anything runs, bounds are checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from ctxprune import recipes
from ctxprune.cli.progress import TuningProgress
from ctxprune.cli.work import Work
from ctxprune.pruner.checkpoints import adapter
from ctxprune.pruner.checkpoints.checkpoint import GATES, read_config
from ctxprune.pruner.errors import CtxpruneError, Interrupted
from ctxprune.recipes import check
from ctxprune.recipes.steps import schema

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_say_what_they_are(path: Path) -> None:
    check(recipes.load(str(path)))
    assert recipes.load(path.stem).name == path.stem
    assert path.read_text().startswith("# ")


def test_the_recipes_of_the_docs_are_shipped() -> None:
    assert {"demo", "smoke", "gpt2", "smollm2-135m"} <= set(recipes.names())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "steps is missing"),
        ({"steps": [{"convert": {}}], "expects": []}, "did you mean `expect`"),
        ({"steps": [{"tune": {"sparsity": 0.8}}]}, "model is missing"),
        ({"steps": [{"tune": 5}]}, "has no options"),
        ({"steps": [{"convert": {"rank": "wide"}}]}, "rank must be a whole number, not 'wide'"),
        ({"steps": [{"name": "../x", "convert": {}}]}, "cannot be the name"),
        ({"steps": [{"convert": {}}], "expect": 5}, "expect must be a list, not 5"),
        ({"steps": [{"convert": {}}], "expect": ["gate 0 perplexity <= 1"]}, "unknown eval step"),
        ({"steps": [{"convert": {}}, {"generate": {"model": "convert"}}]}, "prompt is empty"),
        ({"steps": [{"eval": {"model": "tuned"}}]}, "unknown `model` of step `eval`"),
        ({"steps": [{"convert": {"adapter": "tuned"}}]}, "unknown `adapter` of step `convert`"),
        ({"steps": [{"eval": {"model": __file__}}]}, "unknown `model` of step `eval`"),
        ({"steps": [{"report": {"of": ["eval"]}}]}, "unknown eval step"),
        ({"steps": [{"tun": {}}]}, "did you mean `tune`"),
        ({"steps": [{"tune": {"model": "m", "stepps": 3}}]}, "did you mean `steps`"),
        ({"steps": [{"eval": {"model": "m", "sparsety": [0]}}]}, "did you mean `sparsity`"),
        ({"steps": [{"tune": {"model": "m", "sparsity": 2}}]}, "must be less than 1, not 2"),
        ({"steps": [{"name": "a"}]}, "needs one command"),
        ({"steps": [{"convert": {}}, {"convert": {}}]}, "two steps called"),
        ({"steps": ["convert"]}, "item 1 of steps must be a mapping, not 'convert'"),
        ({"steps": [{"convert": {}}], "expect": ["gate is good"]}, "not understood"),
        ({"steps": [{"tune": {"model": "m", "grid": {"lr": 1}}}]}, "grid of step `tune`"),
        ({"steps": [{"convert": {"grid": {"rnk": [1]}}}]}, "did you mean `rank`"),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CtxpruneError, match=message):
        check(recipes.parse("mine", raw))


def test_a_grid_is_its_combinations_and_what_is_done_with_them() -> None:
    plan = recipes.parse(
        "mine",
        {
            "steps": [
                {"name": "m", "convert": {}},
                {
                    "name": "t",
                    "tune": {"model": "m", "grid": {"lr": [0.5], "train": ["full", "lora"]}},
                },
                {"name": "e", "eval": {"model": "t", "grid": {"policy": ["gate", "sink"]}}},
                {"name": "r", "report": {"of": "e"}},
            ]
        },
    )
    check(plan)
    tuned = ["t-lr-0_5-train-full", "t-lr-0_5-train-lora"]
    assert [step.name for step in plan.steps if step.command == "tune"] == tuned
    assert [step.options["train"] for step in plan.steps[1:3]] == ["full", "lora"]
    evals = [step for step in plan.steps if step.command == "eval"]
    assert [(step.options["model"], step.options["policy"]) for step in evals] == [
        (model, policy) for model in tuned for policy in ("gate", "sink")
    ]
    assert plan.steps[-1].options["of"] == [step.name for step in evals]


def test_unknown_recipes_are_named() -> None:
    with pytest.raises(CtxpruneError, match="did you mean `demo`"):
        recipes.load("dem")
    with pytest.raises(CtxpruneError, match="does not exist"):
        recipes.load("none.yaml")


RESULTS = {
    "gate": {
        "levels": [
            {"sparsity_requested": 0.0, "perplexity": 10.0, "tasks": {}},
            {"sparsity_requested": 0.8, "perplexity": 10.9, "tasks": {"piqa": {"acc": 0.6}}},
        ]
    }
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("gate 0.8 perplexity <= 1.10 * gate 0 perplexity", True),
        ("gate 0.8 perplexity <= 1.05 * gate 0 perplexity", False),
        ("gate 0.8 tasks.piqa.acc >= 0.6", True),
        ("gate 0.8 tasks.piqa.acc >= 0.61", False),
    ],
)
def test_expectations(text: str, holds: bool) -> None:
    (expectation,) = recipes.parse("r", {"steps": [{"convert": {}}], "expect": [text]}).expect
    assert expectation.check(RESULTS)[0] is holds


@pytest.mark.parametrize(
    "text", ["gate 0.7 perplexity <= 1", "gate 0.8 tasks.none.acc <= 1", "none 0 perplexity <= 1"]
)
def test_expectations_on_what_was_not_measured(text: str) -> None:
    (expectation,) = recipes.parse("r", {"steps": [{"convert": {}}], "expect": [text]}).expect
    with pytest.raises(CtxpruneError):
        expectation.check(RESULTS)


def _convert(name: str, source: Path) -> recipes.Recipe:
    return recipes.parse("mine", {"steps": [{"name": name, "convert": {"source": str(source)}}]})


def test_a_run_keeps_and_forgets_only_its_own(
    dense_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = _convert("converted", dense_folder("gpt2"))
    (step,) = plan.steps
    out = tmp_path / "run"
    work = Work(out)
    work.do(step)
    work.do(step)
    assert capfd.readouterr().err.count("already done") == 1
    shutil.rmtree(out / "converted")
    work.do(step)
    assert "already done" not in capfd.readouterr().err
    (out / "mine.txt").write_text("keep me")
    work.forget(plan)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_run_does_not_replace_a_folder_of_the_users(
    dense_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "notes.txt").write_text("keep me")
    plan = _convert("converted", dense_folder("gpt2"))
    work = Work(tmp_path)
    work.forget(plan)
    with pytest.raises(CtxpruneError, match="no recipe made it"):
        work.do(plan.steps[0])
    assert (tmp_path / "converted" / "notes.txt").read_text() == "keep me"


def test_an_interrupted_tune_goes_on(
    tiny_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """The second run starts after the step that the first one saved."""
    options = {
        "model": str(tiny_folder("gpt2")),
        "data": str(text_file),
        "steps": 4,
        "context": 128,
        "save_every": 2,
    }
    plan = recipes.parse("mine", {"steps": [{"name": "tuned", "tune": options}]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxprune.pruner.training.tune.calibrate", _stop)
        with pytest.raises(Interrupted):
            Work(tmp_path).do(plan.steps[0])
    assert not (tmp_path / "tuned").exists()
    steps: list[int] = []

    @contextmanager
    def record() -> Iterator[TuningProgress]:
        listeners = (lambda _: None, lambda *_: None, lambda *_: None)
        yield TuningProgress(lambda figures: steps.append(figures["step"]), *listeners)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxprune.cli.work.tuning_progress", record)
        Work(tmp_path).do(plan.steps[0])
    assert (tmp_path / "tuned").is_dir()
    assert 1 not in steps


def test_a_step_goes_on_from_the_adapter_of_another(
    dense_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """One may change its bonus, and do so for each model of a grid."""
    source = {"source": str(dense_folder("gpt2"))}
    options = {"data": str(text_file), "steps": 1, "context": 64, "train": "lora"}
    plan = recipes.parse(
        "mine",
        {
            "steps": [
                {"name": "m", "convert": source},
                {"name": "t", "tune": {"model": "m", **options, "grid": {"seed": [0, 1]}}},
                {"name": "c", "convert": {**source, "adapter": "t", "attention_bonus": 2.0}},
            ]
        },
    )
    check(plan)
    work = Work(tmp_path / "run")
    for step in plan.steps:
        work.do(step)
    for seed in ("0", "1"):
        tuned, made = (work.out / f"{name}-seed-{seed}" for name in ("t", "c"))
        assert read_config(made) == replace(read_config(tuned), attention_bonus=2.0)
        assert (made / GATES).read_bytes() == (tuned / GATES).read_bytes()


def test_a_step_averages_the_adapters_of_others(
    dense_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    source = {"source": str(dense_folder("gpt2"))}
    tune = {"model": "m", "data": str(text_file), "steps": 1, "context": 64, "train": "lora"}
    steps = [
        {"name": "m", "convert": source},
        {"name": "a", "tune": tune},
        {"name": "b", "tune": {**tune, "sparsity": 0}},
        {"name": "c", "convert": {**source, "adapter": ["a", "b"]}},
    ]
    plan = recipes.parse("mine", {"steps": steps})
    check(plan)
    work = Work(tmp_path / "run")
    for step in plan.steps:
        work.do(step)
    tuned, made = work.out / "a", work.out / "c"
    assert read_config(made) == read_config(tuned)
    assert adapter.read(made / adapter.FILE).about.lora_rank == 2 * 16
    steps[-1] = {"name": "c", "convert": {**source, "adapter": ["a", "d"]}}
    with pytest.raises(CtxpruneError, match="unknown `adapter` of step `c` `d`"):
        check(recipes.parse("mine", {"steps": steps}))


# What makes a recipe for a GPU one for a test: the steps and what they name stay as they are.
TINY: dict[str, Any] = {
    "context": 128,
    "batch_size": 2,
    "bf16": False,  # accelerate holds to the precision of the first run of a process
    "max_tokens": 512,
    "tokens": 256,
    "limit": 1,
    "lengths": [512],
    "sparsity": [0, 0.8],
    "tasks": ["fidelity", "retrieval", "multi_key", "hellaswag", "piqa"],
}


@pytest.mark.parametrize(
    "name", ["smollm2-135m-gpu", pytest.param("smollm2-1.7b-gpu", marks=pytest.mark.zoo)]
)
def test_the_recipes_for_a_gpu_go_through(
    name: str, text_file: Path, task_folder: Path, tmp_path: Path
) -> None:
    """On the embedded model, with little text; and again, with nothing left to do."""
    steps = []
    for step in recipes.load(name).steps:
        tiny = {key: TINY.get(key, value) for key, value in step.options.items()}
        tiny |= dict.fromkeys({"data", "valid", "text"} & tiny.keys(), str(text_file))
        if step.command == "convert":
            del tiny["source"]  # the embedded model
        if step.command == "tune":
            tiny["sparsity"] = step.options["sparsity"]
        if step.command == "eval":
            tiny["tasks"] = [task for task in step.options["tasks"] if task in TINY["tasks"]]
        if "data_dir" in tiny:
            tiny["data_dir"] = str(task_folder)
        steps.append({"name": step.name, step.command: tiny})
    plan = recipes.parse(name, {"steps": steps})
    check(plan)
    work = Work(tmp_path / "run")
    for step in plan.steps:
        work.do(step)
    for of, most in (("fidelity", 0.0), ("fidelity-lora", 1.0)):
        dense = work.results[of]["levels"][0]["tasks"]["fidelity"]["running_divergence"]
        # LoRA has moved the weights, so the reference is the model that was converted.
        assert 0.0 <= dense <= most and (dense > 0.0) == (of == "fidelity-lora")
    assert (tmp_path / "run" / "exported" / "config.json").is_file()
    for step in plan.steps:
        work.do(step)


def _stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_schema_for_editors_is_that_of_the_code() -> None:
    written = files("ctxprune.recipes") / "recipe.schema.json"
    assert written.read_text(encoding="utf-8") == schema(), "run `make docs`"
