"""The local phase: its error is that of the equations, and it moves the gates alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_soft import written_out

from ctxprune.pruner.checkpoints.checkpoint import GATES, load
from ctxprune.pruner.config import PruneConfig, TuneConfig
from ctxprune.pruner.decoder import output_of
from ctxprune.pruner.engine.handle import GATES as GATE_MODULES
from ctxprune.pruner.engine.handle import Handle, handle_of
from ctxprune.pruner.engine.soft import Level, prior
from ctxprune.pruner.errors import Interrupted
from ctxprune.pruner.training.local import LocalAttention
from ctxprune.pruner.training.metrics import METRICS
from ctxprune.pruner.training.objective import local_loss, sparsity_penalty
from ctxprune.pruner.training.tune import tune

Make = Callable[[str], Path]

CONFIG = PruneConfig(attention_bonus=0.0)
RUN = TuneConfig(
    sparsity=0.7,
    steps=3,
    local_steps=4,
    context=128,
    batch_size=2,
    save_every=2,
    train="full",
)


def local_pass(
    model: torch.nn.Module, ids: torch.Tensor, level: Level | None = None
) -> LocalAttention:
    """A forward pass that compares softly pruned attention with dense attention."""
    soft = LocalAttention(level or Level(1.5), CONFIG, sharpness=1.3)
    with soft.watch(handle_of(model).decoder), handle_of(model).running(soft):  # type: ignore[arg-type]
        model(ids, use_cache=False)
    return soft


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_error_is_that_of_the_equations(tiny_folder: Make, family: str) -> None:
    """|W_o (a - d)|^2 / |x|^2 of each layer, on the dense hidden states, and without a bias."""
    model = load(tiny_folder(family), dtype="float64")
    handle: Handle = handle_of(model)
    torch.manual_seed(0)
    for gate in handle.gate_list:
        torch.nn.init.normal_(gate.key.weight, std=0.5)
    ids = torch.randint(0, 60, (2, 40))
    seen: dict[int, dict[str, torch.Tensor]] = {}
    attend = LocalAttention.attend

    def noted(self, module, gate, layer, *tensors, **options):  # type: ignore[no-untyped-def]
        seen[layer] = {"tensors": tensors, "x": self._residual[layer], **options}
        seen[layer]["d"] = attend(self, module, gate, layer, *tensors, **options)
        return seen[layer]["d"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalAttention, "attend", noted)
        soft = local_pass(model, ids)
    for layer, of_layer in enumerate(handle.decoder.gated):
        saw = seen[layer]
        gate, scale = handle.gate_list[layer], saw["logits"].scale
        pruned, _ = written_out(soft, gate, *saw["tensors"], scale=scale)
        change = (pruned - saw["d"]).transpose(1, 2).flatten(2)
        weight = output_of(of_layer.attention).weight
        moved = change @ (weight if family == "gpt2" else weight.T)
        expected = (moved.norm(dim=-1) / saw["x"].norm(dim=-1)).square().mean()
        torch.testing.assert_close(soft.errors[layer], expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_runs_dense_and_only_gates_have_gradients(tiny_folder: Make, family: str) -> None:
    model = load(tiny_folder(family))
    model.requires_grad_(True)
    ids = torch.randint(0, 60, (1, 40))
    soft = LocalAttention(Level(1.5), CONFIG)
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
    with soft.watch(handle_of(model).decoder), handle_of(model).running(soft):
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, dense)
    local_loss(torch.stack(list(soft.errors.values()))).backward()
    gates = {id(parameter) for parameter in handle_of(model).gates.parameters()}
    for name, parameter in model.named_parameters():
        assert id(parameter) in gates or parameter.grad is None, name
    assert all(gate.key.weight.grad.abs().max() > 0 for gate in handle_of(model).gate_list)
    assert not soft._residual and not any(m._forward_pre_hooks for m in blocks(model))


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder blocks of a model."""
    return [layer.block for layer in handle_of(model).decoder.gated]


def test_twice_the_error_counts_alike_at_every_level() -> None:
    errors = torch.tensor([0.1, 0.3])
    torch.testing.assert_close(local_loss(errors), torch.tensor(0.2).log())
    torch.testing.assert_close(local_loss(2 * errors) - local_loss(errors), torch.tensor(2.0).log())


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_phase_comes_first_and_moves_the_gates_alone(
    tiny_folder: Make, text_file: Path, tmp_path: Path, train: str
) -> None:
    folder = tiny_folder("llama")
    config = dataclasses.replace(RUN, data=str(text_file), train=train)
    state: list[dict[str, torch.Tensor]] = []

    def look(figures: dict[str, float]) -> None:
        if figures["step"] in (3, 5):
            state.append(load_file(tmp_path / ".out.tuning" / "state.safetensors"))

    out = tune(folder, tmp_path / "out", config, on_step=look)
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [("local_error" in line, "lm_loss" in line) for line in lines] == (
        [(True, False)] * 4 + [(False, True)] * 3
    )
    assert {line["steps"] for line in lines} == {7}
    first, second = state
    moved = {
        name
        for name, before in first.items()
        if name.startswith("parameter/") and not torch.equal(before, second[name])
    }
    assert moved and all(f".{GATE_MODULES}." in name for name in moved)
    assert load_file(out / GATES).keys() == load_file(folder / GATES).keys()


def test_it_resumes_and_a_dense_control_leaves_it_out(
    tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    folder = tiny_folder("gpt2")
    config = dataclasses.replace(RUN, data=str(text_file))
    whole = tune(folder, tmp_path / "whole", config)

    def stop(figures: dict[str, float]) -> None:
        if figures["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 3 of 7"):
        tune(folder, tmp_path / "parts", config, on_step=stop)
    parts = tune(folder, tmp_path / "parts", config, resume=True)
    for name in (GATES, "model.safetensors"):
        expected, actual = load_file(whole / name), load_file(parts / name)
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    steps: list[dict[str, float]] = []
    control = dataclasses.replace(config, sparsity=0.0)
    tune(folder, tmp_path / "control", control, on_step=steps.append)
    assert [step["step"] for step in steps] == [1, 2, 3]


def test_it_teaches_the_gates_to_keep_what_attention_needs(
    tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    """On a text that it has not seen, the loss of the phase is lower than with fresh gates."""
    config = dataclasses.replace(RUN, data=str(text_file), train="gates", steps=0, local_steps=40)
    folder = tiny_folder("llama")
    out = tune(folder, tmp_path / "out", config)
    ids = torch.randint(0, 60, (2, 128), generator=torch.Generator().manual_seed(5))
    losses = []
    for made in (folder, out):
        soft = local_pass(load(made, sparsity=0.0), ids, Level(prior(0.7, 128)))
        kept = torch.stack(list(soft.kept.values())).mean()
        error = local_loss(torch.stack(list(soft.errors.values())))
        losses.append(float((error + sparsity_penalty(kept, 0.7)).detach()))
    assert losses[1] < losses[0] - 0.05
