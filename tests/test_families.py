"""Well-known families from a checkpoint to its export, and every command that reads one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from zoo import VOCABULARY, tiny

from ctxprune import load
from ctxprune.evals.config import BenchConfig
from ctxprune.evals.inspect.inspection import InspectConfig, Subject, inspect, page_data
from ctxprune.evals.quality.evaluate import EvalConfig, evaluate
from ctxprune.evals.speed.bench import bench
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.checkpoints.export import export
from ctxprune.pruner.config import TuneConfig
from ctxprune.pruner.training.tune import tune

CONTEXT = 64
ALWAYS = ("qwen3", "gemma3_text", "gpt_oss", "deepseek_v3")
ALSO = ("mistral", "phi3", "qwen3_moe")
Make = Callable[[str], Path]


@pytest.fixture
def converted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """Make the converted folder of a tiny model, with the one it is made from beside it."""

    def make(name: str) -> Path:
        dense = tmp_path / "dense"
        model = zoo.with_images() if name == "gemma3" else tiny(name, dtype=torch.float32)
        model.save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        return convert(str(dense), tmp_path / "converted", {"rank": 8, "context": CONTEXT})

    return make


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> Tensor:
    """Logits (2, CONTEXT, vocabulary) of random tokens."""
    draw = torch.Generator().manual_seed(0)
    logits: Tensor = model(torch.randint(3, VOCABULARY, (2, CONTEXT), generator=draw)).logits
    return logits


@pytest.mark.parametrize(
    "name", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.zoo) for name in ALSO)]
)
def test_a_family_from_checkpoint_to_export(
    name: str, converted: Make, text_file: Path, tmp_path: Path
) -> None:
    settings = TuneConfig(
        data=str(text_file), steps=3, local_steps=1, context=CONTEXT, train="lora", sparsity=0.5
    )
    tuned = tune(converted(name), tmp_path / "tuned", settings)
    exported = export(tuned, tmp_path / "exported")
    plain, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dense = logits_of(plain)
    assert torch.equal(dense, logits_of(load(tuned, sparsity=0.0)))
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not torch.equal(dense, logits_of(before))
    model = load(exported, sparsity=0.5)
    with model.ctxprune.measure() as usage:
        assert not torch.equal(logits_of(model), dense)
    assert usage.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", ["mistral", "qwen3_next"])
def test_perplexity_within_a_window_and_beside_states(
    name: str, converted: Make, text_file: Path
) -> None:
    config = EvalConfig(
        sparsity=(0.0, 0.5), policy="h2o", text=str(text_file), context=CONTEXT, tokens=4 * CONTEXT
    )
    dense, pruned = evaluate(converted(name), config)["levels"]
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert 1.0 < dense["perplexity"] != pruned["perplexity"] > 1.0


def test_inspecting_and_timing_a_model_with_windows_and_images(
    converted: Make, text_file: Path
) -> None:
    """What is shown and counted is said of the layers with a gate: one of four here."""
    folder = converted("gemma3")
    config = InspectConfig((Subject("h2o", 0.5),), tokens=CONTEXT)
    (view,) = inspect(folder, text_file.read_text(), config)
    assert view.trace.expires.shape == (1, CONTEXT)
    assert len(page_data([view], "title")["views"]) == 1
    timed = BenchConfig(
        batch=(1,),
        context=(48,),
        sparsity=(0.0, 0.5),
        modes=("dense-dynamic", "pruned"),
        policy="h2o",
        repeats=1,
        prefills=1,
        steps=8,
    )
    rows = {(row["mode"], row["sparsity"]): row for row in bench(folder, timed)["rows"]}
    assert rows["pruned", 0.5]["sparsity_realised"] == pytest.approx(0.5, abs=0.02)
    assert rows["pruned", 0.5]["kv_bytes"] < rows["dense-dynamic", 0.0]["kv_bytes"]
