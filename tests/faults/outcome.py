"""One command in a forked process: what it returned and printed, and what a refusal looks like."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from ctxprune.cli.main import main

# By default forks share its lock, and one that is killed may keep it.
tqdm.set_lock(threading.RLock())

# Seconds after which a command hangs, whatever it does.
PATIENCE = 120.0


@dataclass(frozen=True)
class Outcome:
    """The exit code of a command (negative: the signal that ended it), and what it printed."""

    code: int
    out: str
    err: str


def ctxprune(
    *arguments: str,
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Outcome:
    """Run a command in a fork of this process, which has imported everything already.

    Args:
        env: variables to set; None removes one.
        prepare: called in the fork before the command, for limits and the like.
    """
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin)
        given.seek(0)
        child = os.fork()
        if child == 0:
            for number, file in enumerate((given, out, err)):
                os.dup2(file.fileno(), number)
            _child(arguments, cwd, env or {}, prepare)
        code = _wait(child)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape"))
    return Outcome(code, *texts)


def begun(*arguments: str, cwd: Path) -> int:
    """The process id of a command that runs in a fork and prints nowhere."""
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        _child(arguments, cwd, {}, None)
    return child


def refused(outcome: Outcome, *words: str, code: int = 2) -> None:
    """Assert one sentence that says all of `words`, an exit code, and no traceback."""
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.code == code, (outcome.code, outcome.err)
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert len(errors[0]) < 600, errors[0]
    for word in words:
        assert word in outcome.err, (word, outcome.err)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too: nothing half-written may be among them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _child(
    arguments: tuple[str, ...],
    cwd: Path | None,
    env: Mapping[str, str | None],
    prepare: Callable[[], None] | None,
) -> NoReturn:
    code = 70
    try:
        # PyTorch makes its pool of threads anew after a fork, at the first use. Two threads that
        # read weights must not be the first together: one would find no pool.
        torch.set_num_threads(1)
        # What the test runner put in their place holds no file descriptor.
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
            for number, mode, errors in (
                (0, "r", "strict"),
                (1, "w", "strict"),
                (2, "w", "backslashreplace"),
            )
        )
        for name, value in env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if cwd is not None:
            os.chdir(cwd)
        if prepare is not None:
            prepare()
        sys.argv = ["ctxprune", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _wait(child: int) -> int:
    """The exit code of a process, which is killed if it hangs."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"no end after {PATIENCE:g} s")
