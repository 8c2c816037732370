"""Well-known families from a checkpoint to its export, and every command that reads one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)
from zoo import VOCABULARY, tiny

from ctxprune import load
from ctxprune.evals.config import BenchConfig, EvalConfig
from ctxprune.evals.inspect.inspection import InspectConfig, Subject, inspect, page_data
from ctxprune.evals.quality.evaluate import evaluate
from ctxprune.evals.speed.bench import bench
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.checkpoints.export import export
from ctxprune.pruner.config import TuneConfig
from ctxprune.pruner.errors import CtxpruneError
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
        model = zoo.with_images(name) if name == "gemma3" else tiny(name, dtype=torch.float32)
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


def in_fp8(tensors: dict[str, Tensor], block: int = 32) -> dict[str, Tensor]:
    """Projections in blocks of eight-bit numbers with a scale each, as DeepSeek V3 has them."""
    made = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("proj.weight") and all(size % block == 0 for size in weight.shape):
            rows, columns = (size // block for size in weight.shape)
            parts = weight.float().view(rows, block, columns, block)
            scale = parts.abs().amax(dim=(1, 3), keepdim=True) / 448
            made[name] = (parts / scale).view(weight.shape).to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = scale.view(rows, columns)
    return made


def in_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts in random pairs of four-bit numbers with an exponent for 32, as gpt-oss has them."""
    made = dict(tensors)
    for name in tensors:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = made.pop(name).shape
            shape = experts, outer, inner // 32
            made[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            made[f"{name}_scales"] = torch.full(shape, 123, dtype=torch.uint8)
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they stay quantized")
@pytest.mark.parametrize(
    ("name", "quantized", "settings"),
    [
        ("deepseek_v3", in_fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        ("gpt_oss", in_mxfp4, {"quant_method": "mxfp4"}),
    ],
)
def test_weights_that_a_cpu_expands(
    name: str,
    quantized: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    settings: dict[str, object],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """They are converted as plain numbers, under names that plain transformers reads."""
    dense = tmp_path / "dense"
    tiny(name, dtype=torch.bfloat16).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    tensors = quantized(load_file(dense / "model.safetensors"))
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    folder = convert(str(dense), tmp_path / "converted", {"rank": 8, "context": CONTEXT})
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    first, again = (AutoModelForCausalLM.from_pretrained(path).float() for path in (dense, folder))
    model = load(folder, sparsity=0.0)
    assert torch.equal(logits_of(model), logits_of(again))
    # Weights were rounded to bfloat16 once more.
    assert float((logits_of(again) - logits_of(first)).abs().max()) < 1e-3
    model.ctxprune.use("h2o", 0.5, context=CONTEXT)
    with model.ctxprune.measure() as usage:
        logits_of(model)
    assert usage.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.quantized
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_gates_on_quantized_weights(
    library: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    """They stay as they are, from conversion to export, and gates alone are tuned on them."""
    found: Any = import_module(library)
    settings: Any = BitsAndBytesConfig(load_in_8bit=True)
    if library == "torchao":
        settings = TorchAoConfig(found.quantization.Int8WeightOnlyConfig())
    dense, weights = tmp_path / "dense", tmp_path / "weights"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(weights)
    made = AutoModelForCausalLM.from_pretrained(weights, quantization_config=settings)
    made.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    folder = convert(str(dense), tmp_path / "converted", {"rank": 8, "context": CONTEXT})
    tuning = TuneConfig(
        data=str(text_file), steps=1, local_steps=1, context=CONTEXT, train="gates", sparsity=0.5
    )
    with pytest.raises(CtxpruneError, match="are quantized, and stay"):
        tune(folder, tmp_path / "tuned", replace(tuning, train="lora"))
    exported = export(tune(folder, tmp_path / "tuned", tuning), tmp_path / "exported")
    plain, model = (
        AutoModelForCausalLM.from_pretrained(dense),
        load(exported, sparsity=0.0, dtype="bfloat16"),
    )
    assert torch.equal(logits_of(plain), logits_of(model))
    model.ctxprune.use("gate", 0.5)
    with model.ctxprune.measure() as usage:
        logits_of(model)
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
