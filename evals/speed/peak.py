"""The peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

# glibc's number of the size from which on memory is asked of the system, and given back to it.
MMAP_THRESHOLD = -3
# The size while it is watched; afterwards the largest that glibc would choose by itself.
WATCHED, USUAL = 1 << 20, 32 << 20

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_of(work: Callable[[], None], device: torch.device) -> int | None:
    """Do the work; return the most bytes that were in use meanwhile, the weights included.

    On CUDA these are the bytes allocated on the device, elsewhere the resident set of the process,
    of which holes are no part that glibc keeps between small pieces. None where the platform cannot
    tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    watched = _reset_resident()
    _give_back_from(WATCHED)
    try:
        work()
        return _peak_resident() if watched else None
    finally:
        _give_back_from(USUAL)


def _give_back_from(size: int) -> None:
    """Have glibc, if it is there, give back what is freed in pieces of so many bytes or more."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(MMAP_THRESHOLD, size)


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
