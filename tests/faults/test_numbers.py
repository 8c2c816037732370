"""Numbers that are none: in checkpoints, in training, in what is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import ctxprune, files_of, refused
from safetensors.torch import load_file, save_file
from strangers import USING, Damage, Folders, arguments, copied, make, set_number, tensors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ctxprune.pruner.finite import first_non_finite
from ctxprune.pruner.training.tune import STATE

WEIGHTS, GATES = "model.safetensors", "ctxprune.safetensors"
NORM = "model.norm.weight"
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Folders:
    return make(tmp_path_factory.mktemp("numbers"), tokenizer)


def in_bfloat16(folder: Path) -> None:
    """The weights rounded, with a NaN among them."""
    found = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    found[NORM][3] = NAN
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


def in_shards(folder: Path) -> None:
    """The weights in several files, the last with a NaN."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").unlink(missing_ok=True)
    model.save_pretrained(folder, max_shard_size="40KB")
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    set_number(index[NORM], NORM, NAN)(folder)


BROKEN: dict[str, tuple[Damage, str]] = {
    "NaN": (set_number(WEIGHTS, NORM, NAN), NORM),
    "infinity": (set_number(WEIGHTS, NORM, INFINITE), NORM),
    "minus infinity": (set_number(WEIGHTS, NORM, -INFINITE), NORM),
    "bfloat16": (in_bfloat16, NORM),
    "shards": (in_shards, NORM),
}
OF_GATES: dict[str, tuple[Damage, str]] = {
    "gates NaN": (set_number(GATES, "1.query.weight", NAN), "1.query.weight"),
    "gates infinite": (set_number(GATES, "2.slope", INFINITE), "2.slope"),
    "gates all NaN": (
        tensors(GATES, lambda found: [each.fill_(NAN) for each in found.values()]),
        "0.bias",
    ),
}
CASES = [(name, command) for name in BROKEN for command in ("convert", "eval", "generate")]
CASES += [("NaN", command) for command in USING if command not in ("info", "eval", "generate")]
CASES += [(name, command) for name in OF_GATES for command in USING if command != "info"]


@pytest.mark.parametrize(("name", "command"), CASES, ids=[f"{c}, {n}" for n, c in CASES])
def test_a_checkpoint_that_holds_none(
    name: str, command: str, folders: Folders, tmp_path: Path
) -> None:
    damage, tensor = (BROKEN | OF_GATES)[name]
    source = folders.plain if command == "convert" else folders.tuned
    model, cwd = copied(source, tmp_path / "m", damage), tmp_path / "here"
    cwd.mkdir()
    done = ctxprune(*arguments(command, model, folders.text, cwd / "out"), cwd=cwd)
    refused(done, "holds NaN or infinity", "" if name == "gates all NaN" else f"`{tensor}`")
    assert not files_of(cwd)


def test_they_are_taken_where_that_is_asked_for(folders: Folders, tmp_path: Path) -> None:
    """A row of the embedding that no token has; the folder says so, and is used without a word."""

    def pad(found: dict[str, torch.Tensor]) -> None:
        row = torch.full((1, 32), NAN)
        found["model.embed_tokens.weight"] = torch.cat([found["model.embed_tokens.weight"], row])
        found["lm_head.weight"] = torch.cat([found["lm_head.weight"], torch.zeros(1, 32)])

    model = copied(folders.plain, tmp_path / "m", tensors(WEIGHTS, pad))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 301}))
    given = ["convert", str(model), "--out", "out"]
    refused(ctxprune(*given, cwd=tmp_path), "convert --allow-nonfinite")
    done = ctxprune(*given, "--allow-nonfinite", cwd=tmp_path)
    assert done.code == 0, done.err
    generate = arguments("generate", tmp_path / "out", folders.text, tmp_path)
    assert ctxprune(*generate, cwd=tmp_path).code == 0
    export = ctxprune("export", "--model", "out", "--out", "sent", cwd=tmp_path)
    assert export.code == 0, export.err
    assert ctxprune("generate", "--model", "sent", "It was", cwd=tmp_path).code == 0


def test_an_adapter_that_holds_none(folders: Folders, tmp_path: Path) -> None:
    given = ("tune", "--model", str(folders.tuned), "--out", "lora", "--train", "lora")
    text = ("--data", str(folders.text), "--steps", "1", "--max-length", "64")
    done = ctxprune(*given, *text, cwd=tmp_path)
    assert done.code == 0, done.err
    file = tmp_path / "lora" / "adapter.ctxprune"
    from ctxprune.pruner.checkpoints import adapter

    read = adapter.read(file)
    name = sorted(read.lora)[0]
    read.lora[name][0, 0] = NAN
    adapter.write(file, read)
    convert = ["convert", str(folders.plain), "--adapter", str(file), "--out", "again"]
    refused(ctxprune(*convert, cwd=tmp_path), "holds NaN or infinity", name)


TUNE = ("--max-length", "64", "--batch-size", "1")
DIVERGING: dict[str, tuple[str, ...]] = {
    "full, one step": ("--train", "full", "--lr", "1e30", "--steps", "1"),
    "lora, one step": ("--train", "lora", "--lr", "1e30", "--steps", "1"),
    "full, dense": ("--train", "full", "--sparsity", "0", "--lr", "1e30", "--steps", "3"),
    "every step": ("--train", "full", "--lr", "1e30", "--steps", "6", "--save-every", "1"),
    "lora, bf16": ("--train", "lora", "--lr", "1e30", "--steps", "2", "--bf16"),
}


@pytest.mark.parametrize("name", DIVERGING)
def test_a_run_that_diverges_at_once(name: str, folders: Folders, tmp_path: Path) -> None:
    given = ["tune", "--model", str(folders.tuned), "--data", str(folders.text), "--out", "out"]
    done = ctxprune(*given, *TUNE, *DIVERGING[name], cwd=tmp_path)
    refused(done, "training diverged at step 1", "start again with a lower")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tuning" / STATE).exists()


def broken_gates_after(step: int) -> Callable[[], None]:
    """Have an optimizer step leave NaN in the gates."""

    def prepare() -> None:
        real, calls = torch.optim.AdamW.step, [0]

        def broken(self: Any, *given: Any) -> Any:
            done = real(self, *given)
            calls[0] += 1
            if calls[0] == step:
                gates = self.param_groups[0]["params"]
                with torch.no_grad():
                    gates[0].fill_(NAN)
            return done

        torch.optim.AdamW.step = broken  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(
    ("options", "step", "named", "kept"),
    [
        # Found when the state is saved, by the next step that is not dense, or at the end.
        (("--steps", "6", "--save-every", "1"), 4, 4, 3),
        (("--steps", "6"), 3, 4, 2),
        (("--steps", "5"), 5, 5, 4),
        (("--steps", "1"), 1, 1, 0),
        (("--train", "lora", "--steps", "5", "--dense-share", "1"), 3, 4, 2),
        (("--train", "full", "--steps", "5", "--dense-share", "1"), 5, 5, 4),
        (("--local-steps", "4", "--steps", "2"), 3, 4, 2),
    ],
)
def test_gates_that_become_nan(
    options: tuple[str, ...], step: int, named: int, kept: int, folders: Folders, tmp_path: Path
) -> None:
    given = ["tune", "--model", str(folders.tuned), "--data", str(folders.text), "--out", "out"]
    done = ctxprune(*given, *TUNE, *options, cwd=tmp_path, prepare=broken_gates_after(step))
    said = f"the state after step {kept} is kept" if kept else "start again with a lower"
    refused(done, f"training diverged at step {named}", said)
    state = tmp_path / ".out.tuning" / STATE
    assert state.exists() == bool(kept) and not (tmp_path / "out").exists()
    assert not kept or first_non_finite(load_file(state).items()) is None


@pytest.mark.parametrize("rate", ["--lr", "--gate-lr", "--local-lr"])
def test_a_rate_beyond_float32(rate: str, folders: Folders, tmp_path: Path) -> None:
    given = arguments("tune", folders.tuned, folders.text, tmp_path / "out")
    refused(ctxprune(*given, rate, "1e38", cwd=tmp_path), "beyond what float32 can compute")


def overflow_at(step: int) -> Callable[[], None]:
    """Have the loss of a step be NaN, as it may be of one text in bfloat16."""

    def prepare() -> None:
        from ctxprune.pruner.training import objective, tune

        real, calls = objective.lm_loss, [0]

        def lm_loss(*given: Any) -> Any:
            loss = real(*given)
            if torch.is_grad_enabled():
                calls[0] += 1
            return loss * NAN if calls[0] >= step and torch.is_grad_enabled() else loss

        tune.lm_loss = lm_loss

    return prepare


@pytest.mark.parametrize(
    ("train", "step", "every", "kept"),
    [
        ("full", 6, "50", 4),
        ("lora", 6, "50", 4),
        ("gates", 6, "50", 4),
        ("full", 6, "1", 5),
        ("lora", 2, "50", 1),
        ("full", 5, "3", 3),
    ],
)
def test_the_last_good_state_is_there_to_be_resumed(
    train: str, step: int, every: str, kept: int, folders: Folders, tmp_path: Path
) -> None:
    given = ["tune", "--model", str(folders.tuned), "--data", str(folders.text), "--out", "out"]
    given += [*TUNE, "--train", train, "--steps", "7", "--save-every", every]
    # Gates learn from the dense model alone unless told otherwise.
    given += ["--distill", "0"]
    done = ctxprune(*given, "--lr", "1e-3", cwd=tmp_path, prepare=overflow_at(step))
    refused(
        done,
        f"training diverged at step {step}",
        f"the state after step {kept} is kept",
        "`--resume`",
    )
    state = tmp_path / ".out.tuning" / STATE
    assert first_non_finite(load_file(state).items()) is None
    higher = ctxprune(*given, "--lr", "1e-2", "--resume", cwd=tmp_path)
    refused(higher, "had other settings (lr)")
    other = ctxprune(*given, "--lr", "1e-3", "--seed", "5", "--resume", cwd=tmp_path)
    refused(other, "had other settings (seed)")
    lower = ctxprune(*given, "--lr", "1e-4", "--resume", cwd=tmp_path)
    assert lower.code == 0, lower.err
    assert f"going on from step {kept} with lower learning rates" in lower.err
    about = json.loads((tmp_path / "out" / "ctxprune.json").read_text())["provenance"]["tune"]
    assert about["lr"] == 1e-4 and about["rates_before"] == [{"steps": kept, "lr": 1e-3}]
    assert not (tmp_path / ".out.tuning").exists()


def test_weights_that_overflow_stop_a_measurement(folders: Folders, tmp_path: Path) -> None:
    """Finite weights, too large: nothing is written, and no perplexity of NaN."""
    huge = tensors(WEIGHTS, lambda found: found["lm_head.weight"].fill_(1e38))
    model = copied(folders.tuned, tmp_path / "m", huge)
    for command, said in (
        ("eval", ""),
        ("generate", "are not numbers"),
        ("chat", "chat template"),
        ("tune", ""),
    ):
        out = tmp_path / command
        refused(ctxprune(*arguments(command, model, folders.text, out), cwd=tmp_path), said)
        assert not out.exists()


def test_calibration_alone_of_weights_that_overflow(folders: Folders, tmp_path: Path) -> None:
    huge = tensors(WEIGHTS, lambda found: found["lm_head.weight"].fill_(1e38))
    model = copied(folders.tuned, tmp_path / "m", huge)
    given = ["tune", "--model", str(model), "--data", str(folders.text), "--out", "out", *TUNE]
    done = ctxprune(*given, "--steps", "0", "--train", "gates", cwd=tmp_path)
    refused(done, "are not numbers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
def test_what_is_finite(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -1.5, 1e-7, 6e4]).to(dtype)
    others = {
        "whole": torch.tensor([1, 2]),
        "none": torch.empty(0),
        "away": torch.empty(1, device="meta"),
    }
    assert first_non_finite([("a", values), *others.items()]) is None
    for bad in (NAN, INFINITE, -INFINITE):
        broken = values.float().clone()
        broken[1] = bad
        assert first_non_finite([("a", values), ("b", broken.to(dtype))]) == "b"
