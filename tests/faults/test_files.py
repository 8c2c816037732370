"""What cannot be written: said in one sentence, before any work where that can be known."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from commands import (
    BENCH,
    CONVERT,
    EVAL,
    EXPORT,
    FOLDERS,
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
from outcome import ctxprune, files_of, refused

from ctxprune.pruner import files, words
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import OLD, TEMPORARY, beside, recover, remove, staged, whole, write_text

Do = Callable[[Path], None]
LONG = "q" * 300


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    return copied(workplace, tmp_path)


@pytest.fixture(scope="session")
def results(workplace: Path) -> bytes:
    out = workplace.parent / "results.json"
    done = ctxprune(*EVAL, "--out", str(out), cwd=workplace)
    assert done.code == 0, done.err
    (workplace / ".ctxprune" / "eval-state.json").unlink()
    return out.read_bytes()


def _no_work() -> None:
    """From here on whoever loads a model crashes."""

    def load(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("work was begun")

    replace("pruner.checkpoints.checkpoint.load_dense", load)


# Outputs that cannot be, of every option that takes one, and what is said of them.
NOWHERE = [
    ("text.txt/made", "`text.txt` is a file, not a folder"),
    (f"{LONG}/made", "name is too long"),
    (LONG, "name is too long"),
    ("made/" * 900 + "made", "name is too long"),
]
NO_FOLDER = [
    *NOWHERE,
    ("text.txt", "is a file, not a folder"),
    ("m", "exists already"),
    (".", "holds the working folder"),
    ("made\udcff", "is not UTF-8"),
]
NO_FILE = [*NOWHERE, ("m", "it is a folder"), (".", "it is a folder")]
OUTPUTS = [
    *((command, "--out", *bad) for command in FOLDERS.values() for bad in NO_FOLDER),
    *((command, "--out", *bad) for command in (EVAL, BENCH, SHOWN) for bad in NO_FILE),
    *((REPORT, "--out", f"{out}.md", words) for out, words in NOWHERE),
    *((BENCH, "--plot", *bad) for bad in NO_FILE),
    *((SHOWN, option, *bad) for option in ("--png", "--save") for bad in NOWHERE),
    *((EVAL, "--log-samples", *bad) for bad in NOWHERE),
    *((RECIPE, "--out", *bad) for bad in NOWHERE),
]


@pytest.mark.parametrize(
    ("command", "option", "out", "words"),
    OUTPUTS,
    ids=[f"{command[0]} {option} {out[:20]!a}" for command, option, out, _ in OUTPUTS],
)
def test_a_bad_output_is_refused_before_any_work(
    command: tuple[str, ...], option: str, out: str, words: str, place: Path, results: bytes
) -> None:
    (place / "results.json").write_bytes(results)
    before = files_of(place)
    refused(ctxprune(*command, option, out, cwd=place, prepare=_no_work), words)
    assert files_of(place) == before


def _fails(number: int) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


# How a folder is that takes no new file: permissions do not bind root, so this is made up.
LOCKED = {
    "read-only": (errno.EROFS, "its file system is read-only"),
    "not allowed": (errno.EACCES, "it is not allowed"),
}
WRITERS = {
    "convert": (*CONVERT, "--out", "made"),
    "tune": (*TUNE, "--out", "made"),
    "export": (*EXPORT, "--out", "made"),
    "eval": EVAL,
    "bench": BENCH,
    "inspect": (*SHOWN, "--out", "made.html"),
    "report": (*REPORT, "--out", "made.html"),
    "run": (*RECIPE, "--out", "made"),
}


@pytest.mark.parametrize("why", LOCKED)
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_takes_no_file_is_refused_before_any_work(
    name: str, why: str, place: Path, results: bytes
) -> None:
    (place / "results.json").write_bytes(results)
    before, (number, words) = files_of(place), LOCKED[why]

    def prepare() -> None:
        _no_work()
        replace("pruner.files._open", _fails(number))

    refused(ctxprune(*WRITERS[name], cwd=place, prepare=prepare), words)
    assert files_of(place) == before


@pytest.mark.parametrize("name", ["convert", "tune", "eval", "bench"])
def test_a_file_where_a_folder_has_to_be(name: str, place: Path) -> None:
    """Called like the folder of notes and states."""
    (place / "text").mkdir()
    shutil.rmtree(place / ".ctxprune")
    (place / ".ctxprune").write_text("mine")
    before = files_of(place)
    model = () if name == "convert" else ("--model", "m")
    done = ctxprune(*WRITERS[name], *model, cwd=place, prepare=_no_work)
    refused(done, "`.ctxprune` is a file, not a folder")
    assert files_of(place) == before


@pytest.mark.parametrize("command", [EXPORT, GENERATE, INFO, EVAL, BENCH, SHOWN])
def test_a_file_where_the_current_model_is_noted(command: tuple[str, ...], place: Path) -> None:
    shutil.rmtree(place / ".ctxprune")
    (place / ".ctxprune").write_text("mine")
    before = files_of(place)
    out = ("--out", "made") if command == EXPORT else ()
    refused(ctxprune(*command, *out, cwd=place, prepare=_no_work), "no current model")
    assert files_of(place) == before


# What goes wrong at the last moment, when all is written but not yet on the disk.
LATE = {
    "full": (errno.ENOSPC, "no space is left"),
    "quota": (errno.EDQUOT, "quota"),
    "limit": (errno.EFBIG, "of this size"),
    "broken": (errno.EIO, "Input/output error"),
}
REPLACING = {name: (*command, "--out", "made", "--force") for name, command in FOLDERS.items()}
LATE_WRITERS = {**WRITERS, **REPLACING, "eval": (*EVAL, "--out", "made.json")}


@pytest.mark.parametrize("why", LATE)
@pytest.mark.parametrize("name", [name for name in LATE_WRITERS if name != "bench"])
def test_what_cannot_be_finished_leaves_what_was_there(
    name: str, why: str, place: Path, results: bytes
) -> None:
    (place / "results.json").write_bytes(results)
    made = place / ("made" if name in REPLACING else "made.json")
    if name in REPLACING:
        made.mkdir()
        made = made / "mine"
    if name != "run":
        made.write_text("mine")
    before, (number, words) = files_of(place), LATE[why]
    done = ctxprune(
        *LATE_WRITERS[name],
        cwd=place,
        prepare=lambda: replace("pruner.files.os.fsync", _fails(number)),
    )
    refused(done, words)
    assert files_of(place) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_a_disk_without_room_is_known_before(name: str, place: Path) -> None:
    before = files_of(place)

    def prepare() -> None:
        replace("pruner.files.shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
        replace("pruner.checkpoints.checkpoint.write", _fails(errno.EIO))

    refused(ctxprune(*WRITERS[name], cwd=place, prepare=prepare), "0.0 MB are left on its disk")
    assert files_of(place) == before


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("met", [False, True], ids=["known before", "met while writing"])
def test_a_limit_on_files(name: str, met: bool, place: Path) -> None:
    """As `ulimit -f` sets it: below the weights, or too low for their file by its header."""
    before = files_of(place)
    weights = (place / "m" / "model.safetensors").stat().st_size
    limit = weights - 100 if met else weights // 2

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = ctxprune(*WRITERS[name], cwd=place, prepare=prepare)
    refused(done, "a file of this size is not allowed" if met else "they may have")
    left = {name: text for name, text in files_of(place).items() if ".tuning/" not in name}
    assert left == before


NAMES = [
    "a b",
    " a ",
    "it's",
    'quo"te',
    "new\nline",
    "-m",
    "--force",
    ".hidden",
    "ünï 語",
    "[bold]m",
    "a\\b",
    "%s{0}$HOME",
    "q" * 250,
    "q" * 255,
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_will_do(name: str, place: Path) -> None:
    for command in (CONVERT, (*CONVERT, "--force"), TUNE):
        out = f"{name}-" if command is TUNE and len(name) < 250 else name
        if command is TUNE and out == name:
            continue
        done = ctxprune(*command, f"--out={out}", cwd=place)
        assert done.code == 0, done.err
        assert words.line(f"wrote {out}") in done.err
        assert (place / out / "ctxprune.json").is_file()
        shown = ctxprune("info", cwd=place)
        assert shown.code == 0 and "Traceback" not in shown.err, shown.err
    assert not leftovers(place)


def test_a_result_may_have_a_name_that_is_no_text(place: Path) -> None:
    done = ctxprune(*EVAL, "--out", "made\udcff.json", cwd=place)
    assert done.code == 0, done.err
    assert (place / "made\udcff.json").is_file() and not leftovers(place)


@pytest.mark.parametrize("command", [("info",), ("eval",), ("export", "--out", "made")])
@pytest.mark.parametrize("name", ["none\udcff", LONG, "none/" * 900])
def test_a_model_of_a_bad_name_is_refused(command: tuple[str, ...], name: str, place: Path) -> None:
    model = (name,) if command == ("info",) else ("--model", name)
    refused(ctxprune(*command, *model, cwd=place))


@pytest.mark.parametrize("noted", [b"", b"\n", b"m\0m\n"])
def test_a_damaged_note_of_the_current_model(noted: bytes, place: Path) -> None:
    (place / ".ctxprune" / "current").write_bytes(noted)
    refused(ctxprune("info", cwd=place), "names no folder")


def _closed(number: int) -> Callable[[], None]:
    def prepare() -> None:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)

    return prepare


def _stdout(open_it: Callable[[], int]) -> Callable[[], None]:
    def prepare() -> None:
        os.dup2(open_it(), 1)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115

    return prepare


def _unread() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


PRINTERS = {
    "info": INFO,
    "generate": GENERATE,
    "generate --json": (*GENERATE, "--json"),
    "eval": EVAL,
    "inspect": SHOWN,
    "--version": ("--version",),
}


@pytest.mark.parametrize("number", [0, 1, 2], ids=["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("name", [*PRINTERS, *FOLDERS])
def test_a_stream_that_is_closed(name: str, number: int, place: Path) -> None:
    command = (PRINTERS | WRITERS)[name]
    done = ctxprune(*command, cwd=place, prepare=_closed(number))
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert not leftovers(place)


@pytest.mark.parametrize("name", PRINTERS)
def test_nobody_reads_what_is_printed(name: str, place: Path) -> None:
    done = ctxprune(*PRINTERS[name], cwd=place, prepare=_stdout(_unread))
    assert done.code == 130, (done.code, done.err)
    assert "error" not in done.err and "Traceback" not in done.err, done.err
    assert not leftovers(place)


@pytest.mark.parametrize("name", [name for name in PRINTERS if name != "--version"])
def test_what_is_printed_does_not_fit(name: str, place: Path) -> None:
    full = _stdout(lambda: os.open("/dev/full", os.O_WRONLY))
    refused(ctxprune(*PRINTERS[name], cwd=place, prepare=full), "no space is left")


def test_an_empty_stdin_is_an_empty_prompt(place: Path) -> None:
    refused(ctxprune("generate", "-", cwd=place, prepare=_closed(0)), "prompt is empty")


def test_a_crash_is_told_where_no_log_can_be_written(place: Path) -> None:
    def prepare() -> None:
        tempfile.tempdir = "/proc/none"
        replace("cli.info.current", _crash)

    done = ctxprune("info", cwd=place, prepare=prepare)
    assert (
        done.code == 70 and "RuntimeError: ours" in done.err and "the traceback above" in done.err
    )


def _crash(*_: Any) -> NoReturn:
    raise RuntimeError("ours")


@pytest.mark.parametrize("home", ["/proc/none", None])
def test_a_machine_without_a_home(home: str | None, place: Path) -> None:
    """In a process of its own: libraries look for it when they are imported."""
    kept = {name: value for name, value in os.environ.items() if name != "HOME"}
    env = {**kept, "TMPDIR": "/proc/none", **({} if home is None else {"HOME": home})}
    command = [sys.executable, "-m", "ctxprune.cli.main", *CONVERT, "--out", "made"]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / "made" / "ctxprune.json").is_file() and not leftovers(place)


def test_devices_are_written_to_and_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "told")
    assert os.read(reader, 100) == b"told" and not pipe.is_file()
    os.close(reader)
    write_text(Path("/dev/null"), "told")
    assert not Path("/dev/null").is_file()
    with pytest.raises(CtxpruneError, match="no space is left"):
        write_text(Path("/dev/full"), "told")


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        (tmp_path / f"link-{name}").symlink_to(name)
    write_text(tmp_path / "link-file", "new")
    with staged(tmp_path / "link-folder", force=True) as folder:
        (folder / "inside").write_text("new")
    assert (tmp_path / "link-file").is_symlink() and (tmp_path / "link-folder").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "folder" / "inside").read_text() == "new"


def test_files_have_the_mode_of_new_ones(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    with whole(tmp_path / "made") as temporary:
        temporary.touch(0o600)
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_what_looks_like_a_temporary_is_kept(tmp_path: Path) -> None:
    """Names that people and editors use are not ours to sweep."""
    for name in (".m.old", ".m.tmp", ".m.lock", "m.old", "m~"):
        (tmp_path / name).write_text("mine")
    with staged(tmp_path / "m", force=False):
        pass
    assert len([*tmp_path.iterdir()]) == 6


def _replace_folder(path: Path) -> None:
    with staged(path, force=True) as folder:
        (folder / "a").write_text("new")
        (folder / "inner").mkdir()
        (folder / "inner" / "b").write_text("new")


def _replace_without_exchange(path: Path) -> None:
    replace("pruner.files._exchange", lambda *_: False)
    _replace_folder(path)


def _replace_file(path: Path) -> None:
    write_text(path, "new")


ENDS: dict[str, tuple[Do, bool, list[dict[str, bytes]]]] = {
    # what is done, whether something is there before, and what may be there at any moment
    "folder": (_replace_folder, True, [{"a": b"old"}, {"a": b"new", "inner/b": b"new"}]),
    "first": (_replace_folder, False, [{}, {"a": b"new", "inner/b": b"new"}]),
    "two renames": (
        _replace_without_exchange,
        True,
        [{"a": b"old"}, {"a": b"new", "inner/b": b"new"}],
    ),
    "remove": (remove, True, [{"a": b"old"}, {}]),
    "file": (_replace_file, False, [{}]),
}


@pytest.mark.parametrize("name", ENDS)
def test_killed_at_any_moment(name: str, tmp_path: Path) -> None:
    """At every event that Python's audit tells of, and recovered by who comes next."""
    do, there, allowed = ENDS[name]
    missing, moment = 0, 0
    while True:
        parent = tmp_path / str(moment)
        path = parent / "m"
        parent.mkdir()
        if there:
            path.mkdir()
            (path / "a").write_text("old")
        child = os.fork()
        if child == 0:
            _killed_at(moment, lambda path=path: do(path))  # type: ignore[misc]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if there and name != "remove":
            missing += not path.exists()
        recover(path)
        if name == "file":
            assert not path.exists() or path.read_text() == "new"
        else:
            assert files_of(path) in allowed
        if code == 0:
            break
        assert code == -signal.SIGKILL
        do_again = _replace_file if name == "file" else _replace_folder
        do_again(path)
        assert [each.name for each in parent.iterdir()] == ["m"]
        moment += 1
    assert moment > 5
    # Where two folders are exchanged there is not one moment without any of them.
    assert (missing > 0) == (name == "two renames")


def _killed_at(moment: int, do: Callable[[], None]) -> NoReturn:
    met = 0

    def count(event: str, _: Any) -> None:
        nonlocal met
        if event in ("open", "ctypes.dlsym") or event.startswith(("os.", "shutil.")):
            met += 1
            if met == moment + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with suppress(BaseException):
        do()
    os._exit(0)


def test_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "m"
    beside(path, TEMPORARY).mkdir()
    (beside(path, TEMPORARY) / "half").write_text("half")
    beside(path, OLD).mkdir()
    (beside(path, OLD) / "a").write_text("old")
    recover(path)
    assert files_of(tmp_path) == {"m/a": b"old"}


def test_an_error_of_our_own_is_none_of_writing() -> None:
    with pytest.raises(ValueError, match="ours"), files.writing(Path("m")):
        raise ValueError("ours")
    assert files.refusal(ValueError("ours")) is None
    assert files.refusal(FileNotFoundError(errno.ENOENT, "none")) is None
    told = files.refusal(PermissionError(errno.EACCES, "no", "secret.json"))
    assert told is not None and told.message == "`secret.json` cannot be opened: it is not allowed"


def test_what_libraries_make_of_an_error(tmp_path: Path) -> None:
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(CtxpruneError, match="no space is left"), files.writing(tmp_path):
        raise Exception(said)
