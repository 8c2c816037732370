"""Tuning: it learns, it resumes bit for bit, it never leaves half a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import FAMILIES, tiny_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_laws import pruning_model, random_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from ctxprune.pruner import data
from ctxprune.pruner.checkpoints.checkpoint import GATES, load, load_tokenizer, read_config
from ctxprune.pruner.config import TRAINABLE, TuneConfig
from ctxprune.pruner.engine.handle import GATES as GATE_MODULES
from ctxprune.pruner.engine.handle import Handle, handle_of
from ctxprune.pruner.engine.modes import Off
from ctxprune.pruner.engine.soft import Level, SoftAttention, prior
from ctxprune.pruner.errors import CtxpruneError, Interrupted
from ctxprune.pruner.rows import sparsity_of
from ctxprune.pruner.training.metrics import BOARD, METRICS
from ctxprune.pruner.training.objective import hardening, learning_rate_factor, sample_level
from ctxprune.pruner.training.tune import STATE, Trainee, trainable, tune

Make = Callable[[str], Path]

SMALL = TuneConfig(
    sparsity=0.7, steps=6, context=128, batch_size=2, save_every=2, lr=1e-3, train="full"
)


def run_config(text: Path, **changes: object) -> TuneConfig:
    """A few steps on a text file."""
    return dataclasses.replace(SMALL, data=str(text), **changes)  # type: ignore[arg-type]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Gates and weights of a folder."""
    return load_file(folder / GATES) | load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("train", "sparsity"),
    [("gates", 0.7), ("lora", 0.7), ("full", 0.7), ("lora", 0.0), ("full", 0.0)],
)
def test_what_is_trained_changes_and_nothing_else(
    tiny_folder: Make, text_file: Path, tmp_path: Path, family: str, train: str, sparsity: float
) -> None:
    """With checkpointing for one of the families. Gates are in a file of their own alone, so the
    folder is one of the dense model to any other tool; the saved state holds them once.
    """
    folder = tiny_folder(family)
    before = weights_of(folder)
    states: list[dict[str, torch.Tensor]] = []

    def look(figures: dict[str, float]) -> None:
        if figures["step"] == 3:
            states.append(load_file(tmp_path / ".out.tuning" / STATE))

    config = run_config(
        text_file,
        train=train,
        sparsity=sparsity,
        distill=0.5,
        checkpointing=family == "gpt2",
        report_to=("tensorboard",),
    )
    out = tune(folder, tmp_path / "out", config, on_step=look)
    after = weights_of(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    gates = set(load_file(folder / GATES))
    assert bool(changed & gates) == (sparsity > 0)
    assert bool(changed - gates) == (train != "gates")
    weights = {name for name, _ in tiny_model(family).named_parameters()}
    assert set(load_file(out / "model.safetensors")) == weights
    assert (
        set(load_file(out / GATES))
        == gates
        == {
            f"{layer}.{name}"
            for layer in range(3)
            for name in ("query.weight", "key.weight", "slope", "bias")
        }
    )
    plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {name for name, _ in plain.named_parameters()} == weights
    saved = [name.removeprefix("parameter/") for name in states[0] if name.startswith("parameter/")]
    own = [name for name in saved if GATE_MODULES in name]
    names = [name.split(f"{GATE_MODULES}.")[1] for name in own]
    assert sorted(names) == sorted(gates if sparsity > 0 else ())
    others = set(saved) - set(own)
    if train == "lora":
        assert others and all("lora_" in name for name in others)
    else:
        assert len(others) == (len(weights) if train == "full" else 0)
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(out / BOARD / "ctxprune")).Reload()
    assert [point.value for point in board.Scalars("lm_loss")] == pytest.approx(
        [line["lm_loss"] for line in lines]
    )
    if sparsity > 0:
        pruned = [line for line in lines if "layers_live" in line]
        assert pruned and all(len(line["layers_live"]) == 3 for line in pruned)
        assert all(live > 0.0 for line in pruned for live in line["layers_live"])


def test_the_first_step_starts_from_the_dense_loss(
    tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    folder = tiny_folder("gpt2")
    figures: list[dict[str, float]] = []
    tune(folder, tmp_path / "out", run_config(text_file, sparsity=0.0), on_step=figures.append)
    model = load(folder)
    texts = data.read_texts(str(text_file))
    windows = data.windows(load_tokenizer(folder), texts, 128)
    with torch.no_grad():
        losses = [float(model(w[None], labels=w[None]).loss) for w in windows]
    assert min(losses) - 0.2 < figures[0]["lm_loss"] < max(losses) + 0.2


def test_calibration_realises_its_levels(
    tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    out = tune(tiny_folder("llama"), tmp_path / "out", run_config(text_file, valid=str(text_file)))
    config = read_config(out)
    assert config.tuned == 0.7 and config.context == 128
    assert list(config.levels) == [0.5, 0.6, 0.7, 0.8, 0.9]
    model = load(out)
    windows = data.windows(load_tokenizer(out), data.read_texts(str(text_file)), 128)
    chosen = windows[torch.linspace(0, len(windows) - 1, min(64, len(windows))).long()]
    for level, shares in config.levels.items():
        assert 1 - sum(shares) / len(shares) == pytest.approx(level, abs=0.002)
        handle_of(model).use("gate", level)
        with handle_of(model).measure() as usage, torch.no_grad():
            model(chosen)
        assert usage.sparsity == pytest.approx(level, abs=0.01)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny_folder: Make, text_file: Path, tmp_path: Path, train: str
) -> None:
    folder = tiny_folder("gpt2")
    config = run_config(text_file, train=train, accumulate=2)
    whole = tune(folder, tmp_path / "whole", config)

    def stop_at_three(figures: dict[str, float]) -> None:
        if figures["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 3 of 6"):
        tune(folder, tmp_path / "parts", config, on_step=stop_at_three)
    assert not (tmp_path / "parts").exists()
    parts = tune(folder, tmp_path / "parts", config, resume=True)
    expected, actual = weights_of(whole), weights_of(parts)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert read_config(whole) == read_config(parts)
    assert not (tmp_path / ".parts.tuning").exists()


@pytest.mark.parametrize("train", TRAINABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing_are_those_without(family: str, train: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = dataclasses.replace(
            SMALL, train=train, distill=0.5, lora_rank=4, checkpointing=checkpointing
        )
        model, handle = undropped(family)
        trained, groups = trainable(model, handle, config)
        trainee = Trainee(trained, handle, config).train()
        attended = calls_of(handle.decoder.layers[1].attention)
        loss, _ = trainee(random_ids(2, 96), 0.7, 2.0, 1.0)
        loss.backward()
        # Once for the teacher; once for the loss; once more where layers are computed again.
        assert attended() == 2 + checkpointing
        rates = [group["rate"] for group in groups]
        assert rates == (["gate_lr"] if train == "gates" else ["gate_lr", "lr"])
        of_groups = [p for group in groups for p in group["params"]]
        assert len(of_groups) == len({*of_groups})
        assert {*of_groups} == {p for p in trainee.parameters() if p.grad is not None}
        gradients.append({n: p.grad for n, p in trainee.named_parameters() if p.requires_grad})
    without, recomputed = gradients
    assert without.keys() == recomputed.keys()
    for name, gradient in without.items():
        assert gradient is not None and bool(gradient.any()) != ("lora_A" in name), name
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.7])
@pytest.mark.parametrize("train", TRAINABLE)
def test_the_teacher_is_the_model_as_it_was(train: str, level: float) -> None:
    """LoRA moves the dense model, and is drawn back to what it was; other weights teach
    themselves, at level 0 nothing.
    """
    config = dataclasses.replace(SMALL, train=train, distill=1.0, penalty=0.0, lora_rank=4)
    model, handle = undropped("llama")
    ids = random_ids(2, 96)
    with torch.no_grad(), handle.running(Off()):
        published = model(ids, use_cache=False).logits.log_softmax(-1)
    trained, _ = trainable(model, handle, config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if train != "gates" and parameter.requires_grad and GATE_MODULES not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        with handle.running(Off()):
            now = trained(ids, use_cache=False).logits.log_softmax(-1)
    moved = float((published - now).abs().max())
    assert (moved > 0.1) == (train != "gates")
    loss, seen = Trainee(trained, handle, config)(ids, level, 4.0, 1.0)
    if level == 0.0 and train != "lora":
        assert "divergence" not in seen and loss == seen["lm_loss"]
        return
    teacher = now if train == "full" else published
    with torch.no_grad():
        mode = SoftAttention(Level(prior(level, 96), 0.0), handle.config, sharpness=4.0, alpha=1.0)
        with handle.running(mode if level else Off()):
            student = trained(ids, use_cache=False).logits.log_softmax(-1)
    expected = (teacher.exp() * (teacher - student))[:, :-1].sum(-1).mean()
    torch.testing.assert_close(seen["divergence"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)


def undropped(family: str) -> tuple[PreTrainedModel, Handle]:
    """A tiny model without dropout, whose gates decide by content."""
    model, handle = pruning_model(family, "float32")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, handle


def calls_of(module: torch.nn.Module) -> Callable[[], int]:
    """How often a module is called from now on."""
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return lambda: len(calls)


SCRIPT = """
import sys, torch
from pathlib import Path
from ctxprune.pruner.config import TuneConfig
from ctxprune.pruner.training.tune import tune
torch.set_num_threads(1)
folder, out, text, resume = sys.argv[1:]
config = TuneConfig(sparsity=0.7, steps=40, context=128, save_every=3, lr=1e-3, data=text,
                    train="full")
tune(Path(folder), Path(out), config, resume=resume == "resume")
"""


def test_a_killed_run_resumes_bit_for_bit(
    tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    folder = str(tiny_folder("llama"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, folder]
    subprocess.run([*command, str(whole), str(text_file), "fresh"], check=True)
    process = subprocess.Popen([*command, str(killed), str(text_file), "fresh"])
    state = tmp_path / ".killed.tuning" / STATE
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert state.exists() and not killed.exists()
    subprocess.run([*command, str(killed), str(text_file), "resume"], check=True)
    expected, actual = weights_of(whole), weights_of(killed)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    lines = (killed / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))


PROCESSES = """
import sys, torch
from pathlib import Path
from ctxprune.pruner.config import TuneConfig
from ctxprune.pruner.training.tune import tune
torch.set_num_threads(1)
folder, out, text, accumulate, train = sys.argv[1:]
config = TuneConfig(sparsity=0.7, steps=6, local_steps=2, context=128, batch_size=1,
                    accumulate=int(accumulate), lr=1e-3, train=train, distill=0.5, data=text)
tune(Path(folder), Path(out), config)
print("processes:", torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
"""


@pytest.mark.parametrize("train", ["full", "lora"])
def test_two_processes_do_what_one_does(
    tiny_folder: Make, text_file: Path, tmp_path: Path, train: str
) -> None:
    """Gloo over two processes, against one that accumulates twice as often."""
    folder = str(tiny_folder("llama"))
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    one, two = tmp_path / "one", tmp_path / "two"
    text, environment = str(text_file), {**os.environ, "ACCELERATE_USE_CPU": "true"}
    alone = [sys.executable, str(script), folder, str(one), text, "2", train]
    subprocess.run(alone, check=True, env=environment)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    both = [*launch, str(script), folder, str(two), text, "1", train]
    # What the processes say of a failure is shown by pytest.
    said = subprocess.run(both, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert "processes: 2" in said.stdout
    expected, actual = weights_of(one), weights_of(two)
    start = weights_of(Path(folder))
    assert any(not torch.equal(expected[name], start[name]) for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=2e-4, rtol=1e-3)
    lines = (two / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_budget_of_tokens_or_of_time_ends_the_run(
    tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    folder = tiny_folder("gpt2")
    figures: list[dict[str, float]] = []
    config = run_config(text_file, steps=1000, max_tokens=5 * 128 * 2 + 100)
    tune(folder, tmp_path / "tokens", config, on_step=figures.append)
    assert [f["step"] for f in figures] == [1, 2, 3, 4, 5] and figures[-1]["steps"] == 5
    figures.clear()
    config = run_config(text_file, steps=1000, max_minutes=1e-6)
    out = tune(folder, tmp_path / "time", config, on_step=figures.append)
    assert len(figures) == 1 and read_config(out).tuned == 0.7


def test_resuming_needs_the_same_run(tiny_folder: Make, text_file: Path, tmp_path: Path) -> None:
    folder = tiny_folder("gpt2")
    with pytest.raises(CtxpruneError, match="no interrupted run"):
        tune(folder, tmp_path / "out", run_config(text_file), resume=True)

    def stop(_: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        tune(folder, tmp_path / "out", run_config(text_file), on_step=stop)
    with pytest.raises(CtxpruneError, match="other settings"):
        tune(folder, tmp_path / "out", run_config(text_file, lr=2e-3), resume=True)


def test_divergence_stops_with_a_clear_message(
    tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    config = run_config(text_file, lr=1e30, sparsity=0.0)
    with pytest.raises(CtxpruneError, match="diverged"):
        tune(tiny_folder("gpt2"), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_schedules() -> None:
    config = dataclasses.replace(SMALL, steps=100, alpha=2.0)
    rates = [learning_rate_factor(step, config) for step in range(100)]
    assert rates[0] < 0.2 and max(rates) <= 1.0 and rates[-1] < 0.11
    assert hardening(0, config) == (1.0, 1.0) and hardening(99, config) == (4.0, 2.0)
    levels = [sample_level(step, 0, config) for step in range(400)]
    assert levels == [sample_level(step, 0, config) for step in range(400)]
    assert levels[0] <= 0.1 and max(levels) <= sparsity_of(4, 128)
    assert 0.4 < sum(level == 0 for level in levels) / 400 < 0.6
    assert 0.15 < sum(level == config.sparsity for level in levels) / 400 < 0.35
    alone = dataclasses.replace(config, spread=0.0)
    assert {sample_level(step, 0, alone) for step in range(50, 400)} == {0.0, 0.7}
    control = dataclasses.replace(config, sparsity=0.0)
    assert not any(sample_level(step, 0, control) for step in range(400))
    gates = dataclasses.replace(config, train="gates")
    assert all(sample_level(step, 0, gates) > 0 for step in range(400))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "at least 0, not -0.1"),
        ({"sparsity": 0.0, "train": "gates"}, "nothing to learn"),
        ({"train": "some"}, "unknown value of train"),
        ({"steps": 0, "train": "full"}, "at least 1"),
        ({"steps": 0, "local_steps": 5, "sparsity": 0.0, "train": "full"}, "at least 1"),
        ({"distill": 2.0}, "distill must be at most 1, not 2.0"),
        ({"sparsty": 0.8}, "did you mean `sparsity`"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(CtxpruneError, match=message):
        TuneConfig.from_mapping(options, "a test")


def test_sharding_is_refused(
    tiny_folder: Make, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(CtxpruneError, match="FSDP"):
        tune(tiny_folder("gpt2"), tmp_path / "out", run_config(text_file))
    assert list(tmp_path.glob("*out*")) == []


def test_texts_that_will_not_do(tiny_folder: Make, text_file: Path, tmp_path: Path) -> None:
    folder, out = tiny_folder("gpt2"), tmp_path / "out"
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(CtxpruneError, match="less than one window"):
        tune(folder, out, run_config(short))
    short.write_text("  \n")
    with pytest.raises(CtxpruneError, match="no text"):
        tune(folder, out, run_config(short))
    with pytest.raises(CtxpruneError, match="does not exist"):
        tune(folder, out, run_config(tmp_path / "none.txt"))
    with pytest.raises(CtxpruneError, match="cannot be reached"):
        tune(folder, out, run_config(text_file, sparsity=0.999))
    with pytest.raises(CtxpruneError, match="positions"):
        tune(folder, out, run_config(text_file, context=2048))
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("tensorbord", "did you mean `tensorboard`"), ("wandb", "wandb is not installed")],
)
def test_a_tracker_that_is_not_there_is_refused(
    name: str, said: str, tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    """accelerate would leave it out without a word."""
    with pytest.raises(CtxpruneError, match=said) as refusal:
        tune(tiny_folder("gpt2"), tmp_path / "out", run_config(text_file, report_to=name))
    assert refusal.value.hint
