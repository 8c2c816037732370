"""Two processes on one output: one wins, the other says so before it has done anything."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import BENCH, CONVERT, EVAL, EXPORT, RECIPE, REPORT, SHOWN, TUNE, copied, leftovers
from commands import replace as put
from outcome import Outcome, ctxprune, files_of, refused

from ctxprune.pruner import files
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import LOCK, beside, claimed, staged, write_text

CASES: dict[str, tuple[tuple[str, ...], str]] = {
    # what is run, and what another process is writing
    "convert": ((*CONVERT, "--out", "made"), "made"),
    "convert --force": ((*CONVERT, "--out", "made", "--force"), "made"),
    "tune": ((*TUNE, "--out", "made"), "made"),
    "tune --force": ((*TUNE, "--out", "made", "--force"), "made"),
    "tune --resume": ((*TUNE, "--out", "made", "--resume"), "made"),
    "export": ((*EXPORT, "--out", "made"), "made"),
    "export --force": ((*EXPORT, "--out", "made", "--force"), "made"),
    "eval": (EVAL, ".ctxprune/eval-state.json"),
    "eval --out": ((*EVAL, "--out", "made"), "made"),
    "bench": (BENCH, ".ctxprune/bench-state.json"),
    "bench --out": ((*BENCH, "--out", "made"), "made"),
    "bench --plot": ((*BENCH, "--plot", "made"), "made"),
    "inspect --out": ((*SHOWN, "--out", "made"), "made"),
    "report --out": ((*REPORT, "--out", "made.md"), "made.md"),
    "run": ((*RECIPE, "--out", "made"), "made/recipe"),
    "run --fresh": ((*RECIPE, "--out", "made", "--fresh"), "made/recipe"),
    "run, a step": ((*RECIPE, "--out", "made"), "made/c"),
    "the current model, of convert": ((*CONVERT, "--out", "made"), ".ctxprune/current"),
    "the current model, of tune": ((*TUNE, "--out", "made"), ".ctxprune/current"),
}


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    return copied(workplace, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_what_another_process_writes_is_left_to_it(name: str, place: Path) -> None:
    command, other = CASES[name]
    with claimed(place / other):
        before = files_of(place)
        done = ctxprune(*command, cwd=place, prepare=lambda: put("pruner.files.PATIENCE", 0.0))
        refused(done, f"another process ({os.getpid()}) is writing", other)
        if name != "run, a step":
            assert files_of(place) == before
    assert not leftovers(place)


@pytest.mark.parametrize("name", [name for name in CASES if "current" not in name])
def test_what_a_dead_process_was_writing_is_free(name: str, place: Path) -> None:
    command, other = CASES[name]
    if "report" in name:
        assert ctxprune(*EVAL, "--out", "results.json", cwd=place).code == 0
    if "--resume" in name:
        killed = ctxprune(
            *TUNE,
            "--out",
            "made",
            cwd=place,
            prepare=lambda: _killed("pruner.training.tune.calibrate"),
        )
        assert killed.code == -signal.SIGKILL

    def die(*_: Any) -> None:
        with claimed(place / other):
            os.kill(os.getpid(), signal.SIGKILL)

    assert ctxprune("info", cwd=place, prepare=lambda: put("cli.info.current", die)).code < 0
    assert beside(place / other, LOCK).is_file()
    done = ctxprune(*command, cwd=place)
    assert done.code == 0, done.err
    assert not leftovers(place) and not (place / ".made.tuning").exists()


def _killed(name: str) -> None:
    put(name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))


WHERE = {
    "convert": ((*CONVERT, "--out", "made"), "pruner.checkpoints.convert.check_agreement"),
    "tune": ((*TUNE, "--out", "made"), "pruner.training.tune.calibrate"),
    "eval": (EVAL, "evals.quality.evaluate.perplexity"),
    "run": ((*RECIPE, "--out", "made"), "pruner.training.tune.calibrate"),
}


@pytest.mark.parametrize("name", WHERE)
def test_one_of_two_wins(name: str, place: Path) -> None:
    """The second comes while the first is at work, and is gone before that has ended."""
    command, where = WHERE[name]
    at_work, go_on = os.pipe(), os.pipe()
    found: list[Outcome] = []

    def wait_there() -> None:
        import pkgutil

        original: Callable[..., Any] = pkgutil.resolve_name(f"ctxprune.{where}")
        met: list[None] = []

        def wait(*args: Any, **options: Any) -> Any:
            if not met:
                met.append(None)
                os.write(at_work[1], b"!")
                os.read(go_on[0], 1)
            return original(*args, **options)

        put(where, wait)

    def first() -> None:
        found.append(ctxprune(*command, cwd=place, prepare=wait_there))

    thread = threading.Thread(target=first)
    thread.start()
    os.read(at_work[0], 1)
    try:
        refused(ctxprune(*command, cwd=place), "another process (")
    finally:
        os.write(go_on[1], b"!")
        thread.join()
    assert found[0].code == 0, found[0].err
    assert not leftovers(place)


STATES = [
    ((), 2, "go on with `--resume`, or begin anew with `--force`"),
    (("--resume",), 0, "step 3/3"),
    (("--force",), 0, "the state of an interrupted run for made is dropped"),
    (("--resume", "--lr", "1e-3"), 2, "other settings"),
]


@pytest.mark.parametrize(("options", "code", "words"), STATES)
def test_an_interrupted_run_is_not_lost_unasked(
    options: tuple[str, ...], code: int, words: str, place: Path
) -> None:
    before = ctxprune(
        *TUNE,
        "--out",
        "made",
        cwd=place,
        prepare=_third,
    )
    assert before.code == -signal.SIGKILL
    state = files_of(place / ".made.tuning")
    assert "state.safetensors" in state
    done = ctxprune(*TUNE, "--out", "made", *options, cwd=place)
    assert done.code == code and words in done.err, done.err
    if code:
        assert files_of(place / ".made.tuning") == state
    else:
        assert not (place / ".made.tuning").exists()
    assert not leftovers(place)


def _third() -> None:
    """The third step, not the first, kills."""
    import ctxprune.pruner.training.objective as objective

    calls: list[None] = []

    def loss(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return objective.distillation_loss(*args)

    put("pruner.training.tune.distillation_loss", loss)


def test_a_claim_may_be_made_again_by_its_process(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with claimed(path), claimed(path):
        write_text(path, "mine")
        with claimed(path):
            pass
        assert beside(path, LOCK).is_file()
    assert not leftovers(tmp_path)


def test_a_short_write_is_waited_for(tmp_path: Path) -> None:
    """The other process ends while this one waits, and both files are whole."""
    path = tmp_path / "file"
    told = os.pipe()
    child = os.fork()
    if child == 0:
        with claimed(path):
            os.write(told[1], b"!")
            while not (tmp_path / "waiting").exists():
                pass
        os._exit(0)
    os.read(told[0], 1)
    original = files.time.sleep

    def sleep(seconds: float) -> None:
        (tmp_path / "waiting").touch()
        original(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.time, "sleep", sleep)
        write_text(path, "mine")
    os.waitpid(child, 0)
    assert path.read_text() == "mine" and not leftovers(tmp_path)


def test_a_fork_does_not_hold_what_its_parent_holds(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with claimed(path):
        child = os.fork()
        if child == 0:
            try:
                with staged(path, force=True):
                    os._exit(1)
            except CtxpruneError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert beside(path, LOCK).is_file()


def test_folders_made_on_the_way_are_removed(tmp_path: Path) -> None:
    with pytest.raises(CtxpruneError), claimed(tmp_path / "a" / "b" / "m"):
        assert (tmp_path / "a" / "b").is_dir()
        raise CtxpruneError("no")
    assert not [*tmp_path.iterdir()]
    with claimed(tmp_path / "a" / "b" / "m"):
        write_text(tmp_path / "a" / "b" / "m", "mine")
    assert files_of(tmp_path) == {"a/b/m": b"mine"}
