"""SIGKILL at random moments of commands that write: what was there stays whole, and work goes on.

    make test-kill
    PYTHONPATH=tests:tests/faults python tests/kill.py --kills 30 convert tune

Each command replaces the output of an earlier run. It is killed at a moment drawn from its
measured duration. Then the output has to be that of the earlier run or of the whole new one, byte
for byte; the same command again (`tune` with `--resume`, where there is a state) has to give the
bytes of an uninterrupted run; and nothing may be left behind after it. A row a command is printed,
and the exit code is 1 if any kill failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import CONVERT, EVAL, EXPORT, RECIPE, TUNE, leftovers
from conftest import made_tokenizer, make_workplace
from outcome import Outcome, begun, ctxprune, files_of

MADE = ("--out", "made")
COMMANDS: dict[str, tuple[str, ...]] = {
    "convert": (*CONVERT, *MADE, "--force"),
    "export": (*EXPORT, *MADE, "--force"),
    "tune": (*TUNE, *MADE, "--force"),
    "tune-lora": (*TUNE, "--train", "lora", *MADE, "--force"),
    "eval": (*EVAL, "--out", "made/results.json"),
    "run": (*RECIPE, *MADE),
}


@dataclass
class Row:
    """What the kills of a command came to.

    Attributes:
        kills, late: how many, and those among them that found it ended.
        whole, equal, clean: with the earlier output whole, the bytes of an uninterrupted run
            afterwards, and nothing left behind.
    """

    command: str
    kills: int = 0
    late: int = 0
    whole: int = 0
    equal: int = 0
    clean: int = 0
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.whole == self.equal == self.clean == self.kills


def output(place: Path, ignored: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """What a command made: files and bytes; of results the measurements alone."""
    found: dict[str, Any] = {}
    for name, content in files_of(place / "made").items():
        if name in ignored or name.startswith(".") or "state" in name:
            continue
        found[name] = json.loads(content)["levels"] if name.endswith("results.json") else content
    return found


def again(place: Path, command: tuple[str, ...]) -> Outcome:
    """The same command, going on where there is a state."""
    state = place / ".made.tuning" / "state.safetensors"
    resumed = ("--resume",) if command[0] == "tune" and state.exists() else ()
    return ctxprune(*command, *resumed, cwd=place)


def killed(place: Path, command: tuple[str, ...], after: float) -> bool:
    """Whether a command was still running when it was killed, so many seconds after its start."""
    child = begun(*command, cwd=place)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def campaign(name: str, start: Path, kills: int, draw: random.Random, scratch: Path) -> Row:
    """Kill a command so many times, each time in a copy of a working folder."""
    command, row = COMMANDS[name], Row(name)
    began = time.monotonic()
    before, first, second = (scratch / f"{name}-{part}" for part in ("before", "one", "two"))
    shutil.copytree(start, before)
    (before / "made").mkdir()
    if name != "run":
        # An earlier output that differs from the new one.
        (before / "made" / "mine").write_text("of an earlier run")
    runs = []
    for place in (first, second):
        shutil.copytree(before, place)
        at = time.monotonic()
        done = ctxprune(*command, cwd=place)
        assert done.code == 0, done.err
        runs.append(time.monotonic() - at)
    one, two = output(first), output(second)
    # Logs of times, and cards with a date, differ between any two runs.
    ignored = {file for file in one if one[file] != two.get(file)}
    earlier, new = output(before), output(first, ignored)
    for number in range(kills):
        place = scratch / f"{name}-{number}"
        shutil.copytree(before, place)
        row.kills += 1
        row.late += not killed(place, command, draw.uniform(0.0, min(runs)))
        met = output(place, ignored) if (place / "made").exists() else None
        whole = met in (earlier, new) or (name == "run" and met is not None)
        done = again(place, command)
        row.whole += whole
        row.equal += done.code == 0 and output(place, ignored) == new
        row.clean += not leftovers(place) and not (place / ".made.tuning").exists()
        if not (whole and done.code == 0):
            print(f"{name}, kill {number}: {done.err}", file=sys.stderr)
        shutil.rmtree(place)
    row.seconds = time.monotonic() - began
    return row


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    unknown = set(given.commands) - set(COMMANDS)
    if unknown:
        parser.error(f"unknown command {min(unknown)}")
    with tempfile.TemporaryDirectory(prefix="ctxprune-kill-") as folder:
        start = make_workplace(Path(folder) / "start", made_tokenizer())
        rows = []
        for name in given.commands or COMMANDS:
            draw = random.Random(f"{given.seed} {name}")
            row = campaign(name, start, given.kills, draw, Path(folder))
            rows.append(row)
            print(
                f"{row.command}: {row.kills} kills ({row.late} after its end), whole {row.whole}, "
                f"equal {row.equal}, clean {row.clean}, {row.seconds:.0f} s",
                flush=True,
            )
    sys.exit(not all(row.is_good for row in rows))


if __name__ == "__main__":
    main()
