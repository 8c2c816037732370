"""Files and folders that are replaced whole or not at all, by one process at a time.

What becomes `m` is written beside it as `.m.ctxprune.tmp`. It is on the disk before it takes its
place, by one atomic step. While a process writes there, it holds a lock on `.m.ctxprune.lock`. A
lock ends with its process. So whoever gets it knows that what else lies there was left by a dead
one, and clears it away.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ctxprune.pruner.errors import CtxpruneError, first_line
from ctxprune.pruner.interrupts import deferred

if sys.platform != "win32":
    import fcntl
    import resource

# What lies beside a path while it is written. OLD: what was there, where two folders cannot be
# exchanged in one step.
LOCK, TEMPORARY, OLD = ".ctxprune.lock", ".ctxprune.tmp", ".ctxprune.old"
# Bytes of a file's name on nearly every file system.
LONGEST_NAME = 255
# Seconds to wait for a process that writes a file: it takes no longer than that, and a folder does.
PATIENCE = 10.0
ELSEWHERE = "choose another place"
# What the system says against writing, in words; other errors are told as it tells them.
_REASONS = {
    errno.ENOSPC: ("no space is left on its disk", "free some, or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some, or choose another place"),
    errno.EFBIG: ("a file of this size is not allowed", f"raise `ulimit -f`, or {ELSEWHERE}"),
    errno.EROFS: ("its file system is read-only", ELSEWHERE),
    errno.EACCES: ("it is not allowed", ELSEWHERE),
    errno.EPERM: ("it is not allowed", ELSEWHERE),
    errno.ENAMETOOLONG: ("its name is too long", "give a shorter one"),
    errno.EISDIR: ("it is a folder", "give the path of a new file"),
    errno.ENOTDIR: ("a part of its path is a file", ELSEWHERE),
}
# Of these it is known that something could not be written, wherever they come from.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# How libraries in Rust tell the system's errors.
_IN_WORDS = re.compile(r"\(os error (\d+)\)")
# The places that a process is writing. A fork holds none of them.
_held: set[tuple[int, Path]] = set()


@contextmanager
def claimed(path: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes from writing `path`, and clear away what a dead one left there.

    Folders on the way to it are made; those that stay empty are removed at the end. A process that
    holds it already may claim it again.

    Args:
        patience: seconds to wait for another process.

    Raises:
        CtxpruneError: another process is writing it, or it cannot be written.
    """
    place = _real(path)
    if (os.getpid(), place) in _held:
        yield
        return
    until = time.monotonic() + patience
    with ExitStack() as stack:
        while (other := _claim(path, place, stack)) is not None:
            if time.monotonic() > until:
                raise CtxpruneError(
                    f"another process{other} is writing `{path}`",
                    "wait until it has ended, or choose another place",
                )
            time.sleep(0.02)
        yield


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary file that becomes `path` if all goes well, and vanishes if not.

    A link stays a link to what is replaced. A device or a pipe is written to as it is.

    Raises:
        CtxpruneError: it cannot be written.
    """
    with writing(path):
        if _is_stream(path):
            yield path
            return
    place = _real(path)
    with claimed(path, patience=PATIENCE), writing(path):
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary = beside(place, TEMPORARY)
        try:
            yield temporary
            unlock([temporary])
            _settle(temporary)
            with deferred():
                temporary.replace(place)
                _settle(place.parent)
        finally:
            with deferred():
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        CtxpruneError: it cannot be written.
    """
    with whole(path) as temporary:
        # Of what is no character (half of one, or bytes in the name of a file) its number is left.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


@contextmanager
def staged(path: Path, *, force: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` if all goes well, and vanishes if not.

    Raises:
        CtxpruneError: `path` exists and force is not set, another process is writing it, or it
            cannot be written.
    """
    place = _real(path)
    with claimed(path), writing(path):
        refuse_existing(path, force=force)
        temporary = beside(place, TEMPORARY)
        try:
            temporary.mkdir()
            yield temporary
            inside = [*temporary.rglob("*")]
            unlock(each for each in inside if each.is_file())
            for each in (*inside, temporary):
                _settle(each)
            with deferred():
                _put(temporary, place)
        finally:
            with deferred():
                _discard(temporary)


def remove(path: Path) -> None:
    """Remove a folder, if it is there: at no moment is half of it left.

    Raises:
        CtxpruneError: another process is writing it, or it cannot be removed.
    """
    place = _real(path)
    if place.exists():
        with claimed(path), writing(path), deferred():
            gone = beside(place, TEMPORARY)
            place.rename(gone)
            _discard(gone)


def recover(path: Path) -> None:
    """Put back a folder that a dead process had moved away when it was about to replace it."""
    place = _real(path)
    with suppress(OSError, CtxpruneError):
        if not place.exists() and beside(place, OLD).exists():
            with claimed(path, patience=PATIENCE):
                pass


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise CtxpruneError if no folder may be made at `path`, with `force` if one may not replace.

    It is a file, or holds the working folder, or its name is not UTF-8, which libraries need.
    """
    place = _real(path)
    check_name(path)
    with writing(path):
        if place.exists() and not place.is_dir():
            raise CtxpruneError(f"`{path}` is a file, not a folder", "choose another `--out`")
        if Path.cwd().is_relative_to(place):
            raise CtxpruneError(f"`{path}` holds the working folder", "choose another `--out`")
        if place.exists() and any(place.iterdir()) and not force:
            raise CtxpruneError(
                f"`{path}` exists already", "choose another `--out`, or replace it with `--force`"
            )


def check_name(folder: Path) -> None:
    """Raise CtxpruneError for the name of a folder that libraries could not read or write."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise CtxpruneError(f"the name `{folder}` is not UTF-8", "rename the folder") from error


def check_writable(path: Path) -> None:
    """Raise CtxpruneError if a result could not be written there after hours of work."""
    with writing(path):
        if _is_stream(path):
            return
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with claimed(path, patience=PATIENCE):
        pass


def check_room(path: Path, *sizes: int) -> None:
    """Raise CtxpruneError if files of so many bytes can't be written there, as far as is known."""
    there = next(folder for folder in (path, *_real(path).parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < sum(sizes):
        raise CtxpruneError(
            f"`{path}` takes {sum(sizes) / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are left on its "
            "disk",
            "free some, or choose another place",
        )
    if sys.platform != "win32":
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if 0 <= most < max(sizes):
            raise CtxpruneError(
                f"`{path}` has a file of {max(sizes) / 1e6:,.1f} MB, and they may have "
                f"{most / 1e6:,.1f} MB here",
                "raise `ulimit -f`",
            )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence what the system has against writing `path`.

    Raises:
        CtxpruneError: in place of its errors, and of those that libraries make of them.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number == errno.EPIPE or not (number or isinstance(error, OSError)):
            raise
        reason, hint = _REASONS.get(number or 0, (_strerror(error), ELSEWHERE))
        if number in (errno.ENOTDIR, errno.EEXIST):
            over = (each for each in path.parents if each.exists() and not each.is_dir())
            reason = next((f"`{file}` is a file, not a folder" for file in over), reason)
        raise CtxpruneError(f"`{path}` cannot be written: {reason}", hint) from error


def refusal(error: Exception) -> CtxpruneError | None:
    """What to say of an error of the system that nobody expected; None if it tells too little."""
    number = _number(error)
    if number not in _REASONS:
        return None
    name = getattr(error, "filename", None)
    what = "a file" if name is None else f"`{os.fsdecode(name)}`"
    reason, hint = _REASONS[number]
    return CtxpruneError(
        f"{what} cannot be {'written' if number in FULL else 'opened'}: {reason}", hint
    )


def unlock(paths: Iterable[Path]) -> None:
    """Give files the mode of any new file: some libraries write for their owner alone."""
    for path in list(paths):
        new = path.with_name(".mode")
        new.touch()
        mode = new.stat().st_mode
        new.unlink()
        path.chmod(mode)


def beside(path: Path, suffix: str) -> Path:
    """The hidden neighbour of a path that has its name and a suffix, however long that is."""
    name = f".{path.name}{suffix}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}{suffix}"
    return path.with_name(name)


def _real(path: Path) -> Path:
    """Where a path leads, from the root: links are followed, so that they are not replaced."""
    return Path(os.path.realpath(path))


def _is_stream(path: Path) -> bool:
    """Whether it is there and neither a file nor a folder, or a file without a name."""
    place = _real(path)
    return path.exists() and not (place.is_file() or place.is_dir())


def _claim(path: Path, place: Path, stack: ExitStack) -> str | None:
    """Lock a place until the stack is closed; returns None, or which other process has it."""
    with deferred(), writing(path):
        made = [folder for folder in place.parents if not folder.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, locked = _open(beside(place, LOCK))
        if not locked:
            number = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            return f" ({number})" if number else ""
        held = os.getpid(), place
        _held.add(held)
        stack.callback(_release, held, descriptor, made)
        os.truncate(descriptor, 0)
        os.write(descriptor, str(held[0]).encode())
        old = beside(place, OLD)
        if old.exists() and not place.exists():
            old.rename(place)
        _discard(beside(place, TEMPORARY))
        _discard(old)
    return None


def _open(lock: Path) -> tuple[int, bool]:
    """A descriptor of the file of a lock, and whether it is locked by it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        if not _locked(descriptor):
            return descriptor, False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor, True
        os.close(descriptor)  # who had it has removed the file since it was opened


def _release(held: tuple[int, Path], descriptor: int, made: Iterable[Path]) -> None:
    if held[0] != os.getpid():
        return
    with deferred():
        _held.discard(held)
        _discard(beside(held[1], TEMPORARY))
        _discard(beside(held[1], LOCK))
        os.close(descriptor)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _locked(descriptor: int) -> bool:
    """Lock an open file; returns False if another process has."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks
    return True


def _settle(path: Path) -> None:
    """Have a file or folder on the disk, and not in memory alone.

    When a machine crashes, a new name may be on the disk and the bytes under it may not: what was
    replaced would be lost with what replaces it. A full disk may show here first, too.
    """
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system has it
            raise
    finally:
        os.close(descriptor)


def _put(temporary: Path, place: Path) -> None:
    """Move a folder to its place; what was there is gone then."""
    if not place.exists():
        temporary.rename(place)
    elif not _exchange(temporary, place):
        old = beside(place, OLD)
        place.rename(old)
        try:
            temporary.rename(place)
        except OSError:
            old.rename(place)
            raise
        _settle(place.parent)
        _discard(old)
        return
    _settle(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; returns False where system or file system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    # Linux: from the root, RENAME_EXCHANGE. macOS: RENAME_SWAP, which is 2 as well.
    calls: dict[str, Callable[[ctypes.CDLL], int]] = {
        "linux": lambda system: int(system.renameat2(-100, names[0], -100, names[1], 2)),
        "darwin": lambda system: int(system.renamex_np(*names, 2)),
    }
    try:
        return calls[sys.platform](ctypes.CDLL(None)) == 0
    except (KeyError, AttributeError):  # another system, or a C library that is too old
        return False


def _discard(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _number(error: Exception) -> int | None:
    """The number of the system's error that an exception tells of."""
    if isinstance(error, OSError):
        return error.errno
    told = _IN_WORDS.search(str(error))
    return int(told[1]) if told else None


def _strerror(error: Exception) -> str:
    """What the system says, without the name of a file."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
