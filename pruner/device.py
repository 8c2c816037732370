"""Where a model runs and in which dtype: what `auto` stands for, and what cannot be used."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ctxprune.pruner.errors import CtxpruneError, choose

AUTO = "auto"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
CPUINFO = Path("/proc/cpuinfo")
# What decides how fast a processor computes, and in which dtype: its flag in CPUINFO.
EXTENSIONS = {"AVX-512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX": "amx_bf16", "BF16": "bf16"}
# Any of which computes in bfloat16.
NATIVE = {"AVX512-BF16", "AMX", "BF16"}
# Of the product of two matrices by which the rate of a dtype is measured: some hundredths of a
# second, however slow it is.
SIDE = 512

# `auto`, or what accelerate takes: the device of each part of a model.
DeviceMap = str | Mapping[str, int | str]


@dataclass(frozen=True)
class Place:
    """Where a model is going to run.

    Attributes:
        device: of the whole model, or where its inputs go. dtype: of weights and cache; None: as
            the checkpoint has it.
        parts: the devices of a model that is spread over several; None: one device.
    """

    device: torch.device
    dtype: torch.dtype | None
    parts: DeviceMap | None = None

    def __str__(self) -> str:
        where = f"{self.device} ({processor(self.device)})"
        spread = "" if self.parts is None else " and what else is needed"
        dtype = "the checkpoint's dtype" if self.dtype is None else _name(self.dtype)
        return f"{where}{spread}, {dtype}"


def place(device: str = AUTO, dtype: str = AUTO, parts: DeviceMap | None = None) -> Place:
    """What was asked for, `auto` resolved: the accelerator if there is one, else the CPU.

    A CPU computes in float32 by default, an accelerator in the checkpoint's own dtype.

    Raises:
        CtxpruneError: a device that cannot be used, an unknown dtype, or both a device and parts.
    """
    if parts is not None and device != AUTO:
        raise CtxpruneError(
            "a model is on one device or spread over several, not both",
            "give `--device` or `--device-map`",
        )
    if isinstance(parts, str):
        choose("device map", parts, (AUTO,))
    chosen = _usable(device)
    choose("dtype", dtype, (AUTO, *DTYPES))
    if dtype != AUTO:
        return Place(chosen, DTYPES[dtype], parts)
    return Place(chosen, torch.float32 if chosen.type == "cpu" else None, parts)


def stored(dtype: str = AUTO) -> Place:
    """Where a checkpoint is that is written again: on the CPU, `auto` in the dtype that it has.

    Raises:
        CtxpruneError: an unknown dtype.
    """
    choose("dtype", dtype, (AUTO, *DTYPES))
    return Place(torch.device("cpu"), DTYPES.get(dtype))


def _usable(name: str) -> torch.device:
    """The device of a name.

    Raises:
        CtxpruneError: it cannot hold a tensor.
    """
    if name == AUTO:
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise CtxpruneError("device `meta` holds no numbers, so nothing can be run on it")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0].split(". ")[0].rstrip(".")
        raise CtxpruneError(
            f"device `{name}` cannot be used: {reason}",
            "leave out `--device` to take what there is",
        ) from error
    return device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the ids of a model have to be."""
    return device_of(model.get_input_embeddings())


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, also if its weights are brought there for each pass alone."""
    for part in module.modules():
        # accelerate says it so on the parts of a model that it spread.
        execution = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            return torch.device(execution)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def dtype_name(model: PreTrainedModel) -> str:
    """The dtype of a model's weights, as `--dtype` has it."""
    return _name(model.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def processor(device: torch.device) -> str:
    """The name of a device's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor()) or device.type


def extensions(device: torch.device) -> list[str] | None:
    """Those of `EXTENSIONS` that the processor has; None where it is none, or does not tell."""
    if device.type != "cpu" or not CPUINFO.exists():
        return None
    lines = CPUINFO.read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return [name for name, flag in EXTENSIONS.items() if flag in flags.split()]


def warn_of_emulation(
    device: torch.device, dtype: torch.dtype | None, say: Callable[[str], None]
) -> None:
    """Say in one line, with measured rates, if a processor only emulates a dtype."""
    found = extensions(device)
    if dtype != torch.bfloat16 or found is None or not NATIVE.isdisjoint(found):
        return
    emulated, native = _rate(torch.bfloat16), _rate(torch.float32)
    say(
        f"warning: this processor emulates bfloat16, at {emulated / native:.2g} times the rate of "
        f"float32 ({emulated:.2g} and {native:.2g} products a second)"
    )


def _rate(dtype: torch.dtype) -> float:
    """Products of two numbers that the CPU takes a second, in a product of two matrices."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    matrix[:8] @ matrix  # the first product takes longer
    began = time.perf_counter()
    matrix @ matrix
    return float(SIDE**3 / (time.perf_counter() - began))
