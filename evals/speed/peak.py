"""The peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_of(work: Callable[[], None], device: torch.device) -> int | None:
    """Do the work; return the most bytes that were in use meanwhile, the weights included.

    On CUDA these are the bytes allocated on the device, elsewhere the resident set of the process.
    None where the platform cannot tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    watched = _reset_resident()
    work()
    return _peak_resident() if watched else None


def _reset_resident() -> bool:
    """Forget the peak so far; only Linux can."""
    if not CLEAR.exists():
        return False
    # The allocator keeps what earlier work freed, and that would count as ours.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
