"""Ctrl-C, SIGTERM and SIGHUP end a command by a KeyboardInterrupt, but not just anywhere."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# What asks a command to end; Windows has no SIGHUP.
STOPS = (signal.SIGINT, signal.SIGTERM, *(() if sys.platform == "win32" else (signal.SIGHUP,)))


@contextmanager
def deferred() -> Iterator[None]:
    """Put signals off that would end the command: they are obeyed at the end of the block.

    So what is inside happens whole. A signal that is ignored, or that ends the process by itself,
    stays so. Outside the main thread, where no signal is handled, there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in STOPS
        if callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
