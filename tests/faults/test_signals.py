"""Ctrl-C, SIGTERM and SIGHUP in every command and every phase of it: what can be kept is kept."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import (
    BENCH,
    CONVERT,
    EVAL,
    EXPORT,
    GENERATE,
    INFO,
    RECIPE,
    REPORT,
    SHOWN,
    TUNE,
    copied,
    leftovers,
    replace,
)
from outcome import Outcome, ctxprune, files_of, refused

from ctxprune.pruner.interrupts import STOPS, deferred

CHECKPOINT, TUNING = "pruner.checkpoints.checkpoint", "pruner.training.tune"
LOADING = f"{CHECKPOINT}.load_dense"
MADE = ("--out", "made")

# A command, and a function that it calls in some phase: there the signal comes, at the n-th call.
PHASES: list[tuple[tuple[str, ...], str, int]] = [
    ((*CONVERT, *MADE), LOADING, 1),
    ((*CONVERT, *MADE), "pruner.checkpoints.convert.check_agreement", 1),
    ((*CONVERT, *MADE), f"{CHECKPOINT}.write", 1),
    ((*CONVERT, *MADE), "pruner.files._settle", 3),
    ((*CONVERT, *MADE, "--force"), "pruner.files._put", 1),
    ((*CONVERT, *MADE), "cli.convert.set_current", 1),
    ((*TUNE, *MADE), LOADING, 1),
    ((*TUNE, *MADE), "pruner.training.windows.data.read_texts", 2),
    ((*TUNE, *MADE), f"{TUNING}.trainable", 1),
    ((*TUNE, *MADE), f"{TUNING}._Run.begin", 1),
    ((*TUNE, *MADE), f"{TUNING}._step", 1),
    ((*TUNE, *MADE), f"{TUNING}._step", 3),
    ((*TUNE, *MADE), f"{TUNING}.distillation_loss", 2),
    ((*TUNE, *MADE), "pruner.training.metrics.Metrics.log", 2),
    ((*TUNE, *MADE), f"{TUNING}._Run.save", 2),
    ((*TUNE, *MADE), "pruner.training.calibrate.keep_ratios", 2),
    ((*TUNE, *MADE), "pruner.training.calibrate.Reference.divergence", 2),
    ((*TUNE, *MADE), f"{CHECKPOINT}.write", 1),
    ((*TUNE, *MADE), f"{TUNING}.remove", 2),
    ((*EXPORT, *MADE), LOADING, 1),
    ((*EXPORT, *MADE), "pruner.checkpoints.export.model_card", 1),
    ((*EVAL, "--out", "made.json"), LOADING, 1),
    ((*EVAL, "--out", "made.json"), "evals.quality.evaluate.perplexity", 1),
    ((*EVAL, "--out", "made.json"), "evals.quality.evaluate.perplexity", 2),
    ((*EVAL, "--out", "made.json"), "evals.state.write_text", 1),
    ((*EVAL, "--out", "made.json"), "cli.eval.write_json", 1),
    (BENCH, LOADING, 1),
    (BENCH, "evals.speed.bench._measure", 1),
    ((*SHOWN, "--out", "made.html"), LOADING, 1),
    ((*SHOWN, "--out", "made.html"), "evals.inspect.inspection.trace", 1),
    ((*SHOWN, "--out", "made.html"), "evals.inspect.page.render", 1),
    ((*REPORT, "--out", "made.html"), "evals.report.report_page.html", 1),
    (GENERATE, LOADING, 1),
    (GENERATE, "pruner.generation.generate", 1),
    (("chat",), "pruner.conversation.Conversation.say", 1),
    ((*RECIPE, *MADE), "pruner.checkpoints.convert.check_agreement", 1),
    ((*RECIPE, *MADE), f"{TUNING}._step", 2),
    ((*RECIPE, *MADE), "evals.quality.evaluate.perplexity", 1),
    (INFO, f"{CHECKPOINT}.describe", 1),
    (INFO, "cli.command.Command.parse_args", 1),
    (("--version",), "cli.main._version", 1),
]


def _signalled(name: str, nth: int, number: int) -> Callable[[], None]:
    """What makes a function send this process a signal when it is called for the n-th time."""

    def prepare() -> None:
        module, _, attribute = name.rpartition(".")
        original = _resolved(f"ctxprune.{module}", attribute)
        calls = 0

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                signal.raise_signal(number)
            return original(*args, **options)

        replace(name, wrapped)

    return prepare


def _resolved(path: str, attribute: str) -> Any:
    import pkgutil

    return getattr(pkgutil.resolve_name(path), attribute)


def _kept(place: Path) -> dict[str, bytes]:
    """All files but those that are there to go on from."""
    ours = (
        ".tuning/",
        ".ctxprune/eval-state",
        ".ctxprune/bench-state",
        "made/.",
        "made/eval-state",
    )
    return {
        name: content
        for name, content in files_of(place).items()
        if not any(part in f"{name}/" for part in ours)
    }


def _interrupted(done: Outcome) -> None:
    refused(done, code=130)
    assert "crashed" not in done.err


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Iterator[Path]:
    place = copied(workplace, tmp_path)
    (place / "results.json").write_text("[]")
    yield place
    assert not leftovers(place)


@pytest.mark.parametrize("number", STOPS, ids=[signal.Signals(n).name for n in STOPS])
@pytest.mark.parametrize(
    ("command", "name", "nth"), PHASES, ids=[f"{c[0]} {f} {n}" for c, f, n in PHASES]
)
def test_a_signal_ends_it(
    command: tuple[str, ...], name: str, nth: int, number: int, place: Path
) -> None:
    if command[0] == "report":
        done = ctxprune(*EVAL, "--out", "results.json", cwd=place)
        (place / ".ctxprune" / "eval-state.json").unlink()
    if command[0] == "chat":
        (place / "m" / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    if "--force" in command:
        (place / "made").mkdir()
        (place / "made" / "mine").write_text("mine")
    before = _kept(place)
    done = ctxprune(*command, cwd=place, stdin=b"Hello.\n", prepare=_signalled(name, nth, number))
    if command == ("chat",) and number == signal.SIGINT:
        assert done.code == 0 and "[cut" in done.err  # Ctrl-C ends the answer, not the chat
        return
    _interrupted(done)
    left = _kept(place)
    # A command may be as good as done, when its output is there already: then it is whole.
    late = ("_put", "set_current", ".remove", "run")
    if not (name.endswith(late) or command[0] == "run"):
        assert left == before
    elif (place / "made" / "ctxprune.json").exists():
        assert ctxprune("info", "made", cwd=place).code == 0


INTERRUPTED = [
    *((f"{TUNING}._step", nth, signal.SIGTERM, "1") for nth in (1, 2, 3)),
    *(("pruner.training.metrics.Metrics.log", nth, signal.SIGTERM, "1") for nth in (1, 2, 3)),
    # No state was saved before the signal.
    *((f"{TUNING}._step", 3, number, "50") for number in STOPS),
]


@pytest.mark.parametrize(("name", "nth", "number", "every"), INTERRUPTED)
def test_tune_goes_on_from_where_it_was_interrupted(
    name: str, nth: int, number: int, every: str, place: Path
) -> None:
    """In a step it loses that step; between its update and its line in the log it loses none."""
    tune = (*TUNE, "--save-every", every)
    assert ctxprune(*tune, "--out", "whole", cwd=place).code == 0
    done = ctxprune(*tune, *MADE, cwd=place, prepare=_signalled(name, nth, number))
    _interrupted(done)
    steps = nth if name.endswith("log") else nth - 1
    said = f"stopped after step {steps} of 3; the state is saved" if steps else "before anything"
    assert said in done.err
    assert (place / ".made.tuning").exists() == bool(steps)
    done = ctxprune(*tune, *MADE, *(["--resume"] if steps else []), cwd=place)
    assert done.code == 0, done.err
    one, two = files_of(place / "whole"), files_of(place / "made")
    assert one.keys() == two.keys()
    for file in one:
        if file == "metrics.jsonl":
            assert len(one[file].splitlines()) == len(two[file].splitlines()) == 3
        else:
            assert one[file] == two[file], file
    assert not (place / ".made.tuning").exists()


def test_eval_goes_on_from_where_it_was_interrupted(place: Path) -> None:
    prepare = _signalled("evals.quality.evaluate.perplexity", 2, signal.SIGHUP)
    done = ctxprune(*EVAL, cwd=place, prepare=prepare)
    _interrupted(done)
    assert "finished measurements are kept" in done.err
    done = ctxprune(*EVAL, cwd=place)
    assert done.code == 0 and done.err.count("already done, kept") == 1


def test_run_goes_on_from_where_it_was_interrupted(place: Path) -> None:
    done = ctxprune(*RECIPE, *MADE, cwd=place, prepare=_signalled(f"{TUNING}._step", 3, 15))
    _interrupted(done)
    assert "interrupted in step `t`" in done.err
    done = ctxprune(*RECIPE, *MADE, cwd=place)
    assert done.code == 0 and done.err.count("already done, kept") == 1
    assert "step 3/3" in done.err and "step 1/3" not in done.err


def _deaf(number: int, ends: bool) -> Callable[..., None]:
    """A library that swallows an interruption, and then goes on or makes an error of its own."""

    def call(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if ends:
                raise RuntimeError("no validator could be built") from None
        while True:
            time.sleep(0.01)

    return call


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_a_library_swallows(number: int, ends: bool, place: Path) -> None:
    deaf = _deaf(number, ends)
    done = ctxprune("info", cwd=place, prepare=lambda: replace(f"{CHECKPOINT}.describe", deaf))
    _interrupted(done)


class _Finalized:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_where_nothing_can_be_raised(place: Path) -> None:
    def call(*_: Any, **__: Any) -> None:
        _Finalized()
        while True:
            time.sleep(0.01)

    done = ctxprune("info", cwd=place, prepare=lambda: replace(f"{CHECKPOINT}.describe", call))
    _interrupted(done)
    assert "ignored" not in done.err


def test_ctrl_c_twice_ends_at_once(place: Path) -> None:
    def impatient(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)

    done = ctxprune("info", cwd=place, prepare=lambda: replace(f"{CHECKPOINT}.describe", impatient))
    assert done.code == 130 and "error" not in done.err


@pytest.mark.parametrize("number", STOPS)
def test_what_is_ignored_stays_ignored(number: int, place: Path) -> None:
    """As SIGHUP is under `nohup`."""
    prepare = _signalled(f"{CHECKPOINT}.describe", 1, number)

    def ignoring() -> None:
        signal.signal(number, signal.SIG_IGN)
        prepare()

    assert ctxprune("info", cwd=place, prepare=ignoring).code == 0


def test_handlers_are_those_of_before(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctxprune.cli.main import main

    before = [signal.getsignal(number) for number in STOPS]
    monkeypatch.setattr("sys.argv", ["ctxprune", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_deferred_signal_comes_at_the_end() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        with deferred():
            with deferred():
                os.kill(os.getpid(), signal.SIGINT)
                done.append(1)
            done.append(2)
        done.append(3)
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
