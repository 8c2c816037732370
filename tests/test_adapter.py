"""An adapter: small, and with the published weights the tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_tune import run_config, weights_of

from ctxprune.evals.quality.evaluate import check_reference
from ctxprune.pruner.checkpoints import adapter
from ctxprune.pruner.checkpoints.checkpoint import GATES, SETTINGS, load, read_config, read_settings
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.checkpoints.export import export
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.training.calibrate import MULTIPLES
from ctxprune.pruner.training.tune import tune

Make = Callable[[str], Path]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("train", ["gates", "lora"])
def test_an_adapter_and_the_source_are_the_tuned_model(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path, family: str, train: str
) -> None:
    config = run_config(text_file, train=train)
    tuned = tune(tiny_folder(family), tmp_path / "tuned", config)
    file = tuned / adapter.FILE
    again = convert(str(dense_folder(family)), tmp_path / "again", {}, adapter=[file])
    assert read_config(again) == read_config(tuned)
    gates = load_file(tuned / GATES)
    assert all(torch.equal(gates[n], t) for n, t in load_file(again / GATES).items())
    ids = torch.arange(1, 90)[None]
    logits = []
    for folder in (tuned, again):
        model = load(folder)
        handle = handle_of(model)
        # By the margin alone: attention moves with the rounded weights, and so would the ranking.
        handle.config = replace(handle.config, attention_bonus=0.0)
        handle.use("gate", 0.7, context=89)
        with torch.no_grad():
            logits.append(model(ids).logits)
    # LoRA matrices are rounded to bfloat16.
    torch.testing.assert_close(*logits, atol=2e-2, rtol=0)
    provenance = json.loads((again / SETTINGS).read_text())["provenance"]
    assert provenance["tune"]["data"] == text_file.name  # no path of the machine it was made on


@pytest.mark.parametrize(
    ("first", "second", "rank"), [("lora", "lora", 24), ("gates", "lora", 8), ("lora", "gates", 16)]
)
def test_a_second_run_adds_to_the_adapter_of_the_first(
    tiny_folder: Make,
    dense_folder: Make,
    text_file: Path,
    tmp_path: Path,
    first: str,
    second: str,
    rank: int,
) -> None:
    """With the published weights it is the model after both, also where an adapter made it."""
    tuned = tune(tiny_folder("gpt2"), tmp_path / "tuned", run_config(text_file, train=first))
    source, file = str(dense_folder("gpt2")), tuned / adapter.FILE
    made = convert(source, tmp_path / "made", {}, adapter=[file])
    more = run_config(text_file, train=second, lora_rank=8, seed=1)
    twice = tune(made, tmp_path / "twice", more)
    again = convert(source, tmp_path / "again", {}, adapter=[twice / adapter.FILE])
    ids = torch.arange(1, 90)[None]
    once, there, here = (load(folder, sparsity=0.0) for folder in (tuned, twice, again))
    with torch.no_grad():
        torch.testing.assert_close(here(ids).logits, there(ids).logits, atol=2e-2, rtol=0)
        assert second == "gates" or (here(ids).logits - once(ids).logits).abs().max() > 2e-2
    with safe_open(twice / adapter.FILE, framework="pt") as opened:
        about = json.loads(opened.metadata()["ctxprune"])
    assert about["lora_rank"] == rank
    assert [run["train"] for run in about["provenance"]["earlier"]] == [first]


def test_of_several_adapters_the_weights_are_averaged(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    """The gates are those of the first, and the file in the new folder makes the same again."""
    source, untuned = str(dense_folder("llama")), tiny_folder("llama")
    runs = [
        run_config(text_file, train="lora"),
        run_config(text_file, train="lora", lora_rank=8, sparsity=0.0, seed=1),
    ]
    tuned = [tune(untuned, tmp_path / f"tuned-{i}", run) for i, run in enumerate(runs)]
    made = [
        convert(source, tmp_path / f"made-{i}", {}, adapter=[folder / adapter.FILE])
        for i, folder in enumerate(tuned)
    ]
    both = convert(source, tmp_path / "both", {}, adapter=[f / adapter.FILE for f in tuned])
    assert read_config(both) == read_config(tuned[0])
    assert (both / GATES).read_bytes() == (tuned[0] / GATES).read_bytes()
    first, second, averaged = (load_file(f / "model.safetensors") for f in (*made, both))
    assert any((first[name] - second[name]).abs().max() > 1e-3 for name in first)
    for name, weight in averaged.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2, atol=1e-6, rtol=0)
    again = convert(source, tmp_path / "again", {}, adapter=[both / adapter.FILE])
    assert all(torch.equal(weights_of(again)[n], t) for n, t in weights_of(both).items())
    about = adapter.read(both / adapter.FILE).about
    assert about.lora_rank == 16 + 8
    assert [run["tune"]["seed"] for run in about.provenance["averaged_with"]] == [1]
    card = (export(both, tmp_path / "card") / "README.md").read_text(encoding="utf-8")
    training = card.partition("## Training")[2]
    assert training.index("sparsity 0.7") < training.index("mean") < training.index("sparsity 0.0")


def test_adapters_of_different_models_are_not_averaged(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    run = run_config(text_file, train="lora")
    files = [
        tune(tiny_folder(family), tmp_path / family, run) / adapter.FILE
        for family in ("llama", "gpt2")
    ]
    with pytest.raises(CtxpruneError, match="different models"):
        convert(str(dense_folder("llama")), tmp_path / "out", {}, adapter=files)
    assert not (tmp_path / "out").exists()


def test_no_steps_calibrate_a_tuned_model_anew(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    """Nothing but the levels changes, and the adapter is still one for the published weights."""
    tuned = tune(tiny_folder("llama"), tmp_path / "tuned", run_config(text_file, train="lora"))
    source, file = str(dense_folder("llama")), tuned / adapter.FILE
    ranked = convert(source, tmp_path / "ranked", {"attention_bonus": 3.0}, adapter=[file])
    alone = run_config(text_file, train="gates", steps=0, sparsity=0.65)
    anew = tune(ranked, tmp_path / "anew", alone)
    before, after = weights_of(ranked), weights_of(anew)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    old, new = read_config(ranked), read_config(anew)
    assert set(new.levels) == {*old.levels, 0.65} and new.tuned == 0.65
    assert all(new.levels[level] != old.levels[level] for level in (0.5, 0.8))
    assert new.attention_bonus in {3.0 * multiple for multiple in MULTIPLES}
    assert new == replace(old, levels=new.levels, tuned=0.65, attention_bonus=new.attention_bonus)
    again = convert(source, tmp_path / "again", {}, adapter=[anew / adapter.FILE])
    assert read_config(again) == new
    assert all(torch.equal(weights_of(again)[name], weight) for name, weight in before.items())


def test_after_full_tuning_there_is_no_adapter(
    tiny_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    full = tune(tiny_folder("gpt2"), tmp_path / "full", run_config(text_file, train="full"))
    twice = tune(full, tmp_path / "twice", run_config(text_file, train="lora"))
    assert not (twice / adapter.FILE).exists()


def test_what_needs_no_tuning_can_be_changed(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    tuned = tune(tiny_folder("gpt2"), tmp_path / "tuned", run_config(text_file, train="gates"))
    source, file = str(dense_folder("gpt2")), tuned / adapter.FILE
    dials = {"attention_bonus": 2.0, "max_rows": 64}
    made = convert(source, tmp_path / "made", dials, adapter=[file])
    assert read_config(made) == replace(read_config(tuned), **dials)
    # The adapter in the new folder says so too.
    again = convert(source, tmp_path / "again", {}, adapter=[made / adapter.FILE])
    assert read_config(again) == read_config(made)
    with pytest.raises(CtxpruneError, match="`rank`"):
        convert(source, tmp_path / "other", {"rank": 8}, adapter=[file])


def test_an_adapter_of_another_model_is_refused(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    tuned = tune(tiny_folder("gpt2"), tmp_path / "tuned", run_config(text_file, train="lora"))
    out = tmp_path / "out"
    with pytest.raises(CtxpruneError, match="does not fit"):
        convert(str(dense_folder("llama")), out, {}, adapter=[tuned / adapter.FILE])
    for wrong in (tuned / "model.safetensors", tmp_path / "none"):
        with pytest.raises(CtxpruneError, match="no adapter|does not exist"):
            convert(str(dense_folder("gpt2")), out, {}, adapter=[wrong])
    assert not out.exists()


def test_an_adapter_is_found_by_file_folder_and_name(tmp_path: Path) -> None:
    file = tmp_path / adapter.FILE
    file.touch()
    assert adapter.find(str(file)) == adapter.find(str(tmp_path)) == file
    assert adapter.find("smollm2-135m").stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("name", "repository"), [("smollm2-1b", "ctxprune/smollm2-1b"), ("me/gates", "me/gates")]
)
def test_other_names_are_asked_of_the_hub(
    name: str, repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def download(*what: str) -> str:
        asked.append(what)  # type: ignore[arg-type]
        return str(tmp_path / "cached")

    monkeypatch.setattr(adapter, "hf_hub_download", download)
    assert adapter.find(name) == tmp_path / "cached"
    assert asked == [(repository, adapter.FILE)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2-1b", "could not be fetched from the hub"),
        ("me/gates", "could not be fetched from the hub"),
        ("a/b/c", "could not be fetched from the hub"),
        ("./missing", "does not exist"),
        ("missing.ctxprune", "does not exist"),
        (".", "holds no adapter.ctxprune"),
    ],
)
def test_an_adapter_that_is_not_there_is_one_sentence(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CtxpruneError, match=said) as refusal:
        adapter.find(name)
    assert "\n" not in refusal.value.message


def test_the_gates_alone_leave_the_weights_as_they_were(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    """Sparsity 0 is the published model, and a later calibration is all that was tuned."""
    untuned = tiny_folder("llama")
    tuned = tune(untuned, tmp_path / "tuned", run_config(text_file, train="lora"))
    source = str(dense_folder("llama"))
    alone = convert(source, tmp_path / "alone", {}, adapter=[str(tuned)], gates_only=True)
    published = load_file(untuned / "model.safetensors")
    weights = load_file(alone / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in published.items())
    assert (alone / GATES).read_bytes() == (tuned / GATES).read_bytes()
    assert "tune" not in read_settings(alone).provenance
    assert read_settings(alone).provenance["gates_of"]["train"] == "lora"
    anew = tune(alone, tmp_path / "anew", run_config(text_file, train="gates", steps=0))
    check_reference(anew, None)
    with pytest.raises(CtxpruneError, match="weights of this model were trained"):
        check_reference(tuned, None)
    again = convert(source, tmp_path / "again", {}, adapter=[str(anew)])
    assert read_config(again) == read_config(anew)


@pytest.mark.parametrize("count", [0, 2])
def test_the_gates_alone_are_of_one_adapter(count: int, dense_folder: Make, tmp_path: Path) -> None:
    with pytest.raises(CtxpruneError, match=f"there are {count} adapters"):
        convert(
            str(dense_folder("llama")), tmp_path / "out", {}, adapter=["a"] * count, gates_only=True
        )
