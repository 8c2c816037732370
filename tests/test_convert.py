"""Converting and loading: what is refused, in one sentence, with nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import ctxprune
from transformers import AutoModelForCausalLM

from ctxprune.pruner.checkpoints import checkpoint
from ctxprune.pruner.checkpoints.checkpoint import GATES, SETTINGS, load
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

Make = Callable[[str], Path]


def refuse(message: str, source: str | None, out: Path, **options: Any) -> None:
    """Assert that a conversion fails with this message, and writes nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(CtxpruneError, match=message):
        convert(source, out, {"rank": 4}, **options)
    assert sorted(out.parent.iterdir()) == before


def test_plain_transformers_reads_a_converted_folder_as_the_dense_model(
    tiny_folder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_folder("llama")
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, load(folder)(ids).logits)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_an_untuned_model_prunes_nothing_and_says_so(tiny_folder: Make) -> None:
    model = load(tiny_folder("gpt2"))
    assert handle_of(model).sparsity == 0.0
    with pytest.raises(CtxpruneError, match="not tuned"):
        handle_of(model).use("gate", 0.8)


def test_sources_that_are_no_model(tmp_path: Path, dense_folder: Make) -> None:
    out = tmp_path / "out"
    refuse("does not exist", str(tmp_path / "none"), out)
    refuse("does not exist", str(tmp_path / "none.gguf"), out)
    (tmp_path / "empty").mkdir()
    refuse("no config.json", str(tmp_path / "empty"), out)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    refuse("cannot be read as GGUF", str(tmp_path / "bad.gguf"), out)
    (tmp_path / "file.txt").write_text("hello")
    refuse("is not a model", str(tmp_path / "file.txt"), out)


@pytest.mark.parametrize("kind", ["bert", "t5", "no-such-architecture"])
def test_architectures_that_are_not_supported(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    refuse("not supported|not a model that transformers knows", str(folder), tmp_path / "out")


def test_damaged_weights(tmp_path: Path, dense_folder: Make) -> None:
    folder, out = dense_folder("gpt2"), tmp_path / "out"
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refuse("damaged", str(folder), out)
    weights.write_bytes(b"\xff" * 100)
    refuse("damaged", str(folder), out)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["transformer.h.1.attn.c_attn.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refuse("lack", str(folder), out)


def test_weights_in_several_files(tmp_path: Path, dense_folder: Make) -> None:
    whole = dense_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(whole)
    folder, out = tmp_path / "shards", tmp_path / "out"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and (folder / "model.safetensors.index.json").is_file()
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        converted = load(convert(str(folder), out, {"rank": 4}))
        assert torch.equal(converted(ids).logits, model(ids).logits)
    # The same again from a converted folder in shards, whose gates have a file of their own.
    for name in (GATES, SETTINGS):
        shutil.copy(out / name, folder / name)
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, model(ids).logits)
    shards[1].unlink()
    with pytest.raises(CtxpruneError, match=f"lacks `{shards[1].name}`"):
        load(folder)
    refuse(f"lacks `{shards[1].name}`", str(folder), tmp_path / "again")
    (folder / "model.safetensors.index.json").write_text("{")
    refuse("not valid JSON", str(folder), tmp_path / "again")


def test_pickles_are_refused(tmp_path: Path, dense_folder: Make) -> None:
    folder = dense_folder("gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse("pickle", str(folder), tmp_path / "out")


QUANTIZED: list[tuple[str, dict[str, Any], str]] = [
    ("bitsandbytes", {"load_in_4bit": True}, "bitsandbytes"),
    ("bitsandbytes", {"load_in_8bit": True}, "bitsandbytes"),
    ("gptq", {"bits": 4}, "optimum"),
    ("awq", {"bits": 4}, "gptqmodel"),
    ("compressed-tensors", {"format": "int-quantized"}, "compressed-tensors"),
    ("torchao", {"quant_type": {"default": {}}}, "torchao"),
]


@pytest.mark.parametrize(
    ("method", "settings", "library"),
    [case for case in QUANTIZED if find_spec(case[2].replace("-", "_")) is None],
)
def test_a_quantized_checkpoint_names_the_library_that_is_missing(
    method: str, settings: dict[str, Any], library: str, tiny_folder: Make, tmp_path: Path
) -> None:
    folder = tiny_folder("llama")
    quantize(folder, {"quant_method": method, **settings})
    refuse(f"quantized by {method}, .*{library}", str(folder), tmp_path / "out")
    with pytest.raises(CtxpruneError, match=library):
        load(folder)


def quantize(folder: Path, settings: dict[str, Any]) -> None:
    """Have a folder say of itself that it is quantized."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def test_a_way_to_quantize_that_is_not_known_is_refused(dense_folder: Make, tmp_path: Path) -> None:
    folder = dense_folder("llama")
    quantize(folder, {"quant_method": "ours"})
    refuse("quantized by ours, which transformers does not read", str(folder), tmp_path / "out")
    done = ctxprune("convert", str(folder), "--out", "out", cwd=tmp_path, code=2)
    assert done.stderr.count("error:") == 1 and not done.stdout
    quantize(folder, {})
    refuse("quantized by an unnamed method", str(folder), tmp_path / "out")


def test_an_output_that_exists_needs_force(tmp_path: Path, dense_folder: Make) -> None:
    source, out = str(dense_folder("gpt2")), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    refuse("exists already", source, out)
    assert (out / "mine").read_text() == "keep"
    convert(source, out, {"rank": 4}, force=True)
    assert not (out / "mine").exists() and (out / SETTINGS).exists()


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, dense_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "save_file", full)
    refuse("no space is left", str(dense_folder("gpt2")), tmp_path / "out")


def test_folders_that_cannot_be_loaded(tiny_folder: Make, tmp_path: Path) -> None:
    with pytest.raises(CtxpruneError, match="there is no folder"):
        load(tmp_path / "none")
    with pytest.raises(CtxpruneError, match="was not converted"):
        load(tmp_path)
    folder = tiny_folder("gpt2")
    gates = load_file(folder / GATES)
    save_file({name: tensor for name, tensor in gates.items() if name[0] != "2"}, folder / GATES)
    with pytest.raises(CtxpruneError, match="do not fit"):
        load(folder)
    (folder / GATES).write_bytes(b"nonsense")
    with pytest.raises(CtxpruneError, match="damaged"):
        load(folder)
    settings = json.loads((folder / SETTINGS).read_text())
    settings["config"]["rnak"] = 3
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(CtxpruneError, match="did you mean `rank`"):
        load(folder)
    (folder / SETTINGS).write_text("{")
    with pytest.raises(CtxpruneError, match="not valid JSON"):
        load(folder)


def test_settings_out_of_range(tiny_folder: Make) -> None:
    folder = tiny_folder("gpt2")
    for sparsity in (-0.1, 1.0, 3.0):
        with pytest.raises(CtxpruneError, match="sparsity must be"):
            load(folder, sparsity=sparsity)
    with pytest.raises(CtxpruneError, match="unknown policy `sinks`, did you mean `sink`"):
        load(folder, policy="sinks")
    with pytest.raises(CtxpruneError, match="unknown dtype"):
        load(folder, dtype="float7")


def test_texts_beyond_learned_positions(tiny_folder: Make) -> None:
    model = load(tiny_folder("gpt2"), policy="window", sparsity=0.5)
    with pytest.raises(CtxpruneError, match="positions for 1024 tokens"):
        model(torch.ones(1, 1025, dtype=torch.int64))
