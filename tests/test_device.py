"""Where a model runs: what `auto` is, models over several devices, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES

from ctxprune.pruner import device
from ctxprune.pruner.checkpoints.checkpoint import load, load_off
from ctxprune.pruner.device import (
    device_of,
    dtype_name,
    input_device,
    place,
    warn_of_emulation,
)
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

matrix = pytest.mark.parametrize("family", FAMILIES)
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], family: str) -> Path:
    """A converted tiny model."""
    return tiny_folder(family)


@matrix
@pytest.mark.parametrize("policy", ["gate", "h2o", "strided", "snapkv"])
def test_a_model_over_memory_and_disk_is_the_model(family: str, folder: Path, policy: str) -> None:
    """Its parts are brought to where they compute pass by pass; ragged batches and all."""
    whole = load(folder, policy="sink")
    names = [name for name, _ in whole.named_modules()]
    other = {
        name
        for name, module in whole.named_modules()
        if not list(module.children()) and not name.startswith((BLOCKS[family], "ctxprune"))
    }
    blocks = [n for n in names if n.rpartition(".")[0] == BLOCKS[family]]
    parts = dict.fromkeys(sorted(other), "cpu") | {
        name: ("disk" if place % 2 else "cpu") for place, name in enumerate(blocks)
    }
    spread: Any = load(folder, device_map=parts)
    assert sorted({*spread.hf_device_map.values()}) == ["cpu", "disk"]
    assert {p.device.type for p in spread.parameters()} == {"cpu", "meta"}
    gates = handle_of(spread).gate_list
    assert {gate.bias.device.type for gate in gates} == {"cpu"} == {input_device(spread).type}
    ids = torch.randint(0, 90, (2, 120), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    for model in (whole, spread):
        handle = handle_of(model)
        handle.config = replace(handle.config, levels={0.5: (0.5,) * len(gates)})
        handle.use(policy, 0.5, context=140)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(ids, attention_mask=mask, **options) for model in (whole, spread)]
    assert torch.equal(*texts)
    logits = [model(ids, attention_mask=mask).logits[:, 40:] for model in (whole, spread)]
    torch.testing.assert_close(*logits, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "meta"}, "holds no numbers"),
        ({"device": "tpu9"}, "`tpu9` cannot be used"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"device_map": "balanced_"}, "unknown device map `balanced_`"),
        ({"dtype": "float8"}, "unknown dtype `float8`"),
        pytest.param(
            {"device": "cuda"},
            "`cuda` cannot be used",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        pytest.param(
            {"device": "mps"},
            "`mps` cannot be used",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(
    family: str, folder: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(CtxpruneError) as error:
        load(folder, **options)
    assert said in error.value.message
    assert len(error.value.message) < 200 and "\n" not in error.value.message


def test_auto_is_the_accelerator_and_the_dtype_of_the_checkpoint_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = place()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert (place().device.type, place().dtype) == ("cpu", torch.float32)
    assert str(place()).startswith("cpu (") and str(place()).endswith(", float32")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    assert (place().device.type, place().dtype) == ("mps", None)
    assert place("auto", "float16").dtype == torch.float16
    assert place("cpu").dtype == torch.float32
    assert cpu.parts is None and place(parts="auto").parts == "auto"


FLAGS = {
    "avx2": ("flags\t\t: fpu avx2 fma", True),
    "AVX-512": ("flags\t\t: fpu avx2 avx512f", True),
    "AVX512-BF16": ("flags\t\t: fpu avx512f avx512_bf16", False),
    "AMX": ("flags\t\t: fpu amx_bf16 amx_tile", False),
    "Arm": ("Features\t: fp asimd", True),
    "Arm with BF16": ("Features\t: fp asimd bf16", False),
    "unknown": ("", True),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_an_emulated_dtype_is_warned_of_with_its_rate(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, emulated = FLAGS[flags]
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: Abacus\n{told}\n")
    monkeypatch.setattr(device, "CPUINFO", cpuinfo)
    lines: list[str] = []
    cpu = torch.device("cpu")
    for dtype in (torch.float32, None, torch.float16):
        warn_of_emulation(cpu, dtype, lines.append)
    warn_of_emulation(torch.device("meta"), torch.bfloat16, lines.append)
    assert not lines
    warn_of_emulation(cpu, torch.bfloat16, lines.append)
    rate = r"emulates bfloat16, at [\d.e+-]+ times the rate of float32 \(\S+ and \S+ products a s"
    assert [bool(re.search(rate, line)) for line in lines] == [True] * emulated
    cpuinfo.unlink()
    warn_of_emulation(cpu, torch.bfloat16, lines.append)
    assert len(lines) == emulated


@pytest.mark.parametrize("family", ["llama"])
def test_a_model_says_where_it_is_loaded(family: str, folder: Path) -> None:
    lines: list[str] = []
    model = load_off(folder, place("cpu", "bfloat16"), lines.append)
    assert lines == [f"loading the model: {place('cpu', 'bfloat16')}"]
    assert dtype_name(model) == "bfloat16"
    assert device_of(model) == torch.device("cpu")
    assert {gate.bias.dtype for gate in handle_of(model).gate_list} == {torch.float32}
