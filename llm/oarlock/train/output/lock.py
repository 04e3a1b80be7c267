"""One run per output_dir: a lock file that says which process on which host has the folder, and since when.

Two things hold the folder. The kernel's lock on the file (fcntl; on NFS its lock service) is gone in the moment a
process is. The file's content with a heartbeat is for file systems and hosts that the kernel's lock does not reach. A
lock is taken over where its holder can't be alive any more: on the same machine no process of that number and start,
on another one no heartbeat for two minutes. Ages are measured by the file system's clock alone, so that clocks that
differ do no harm.

Nothing here imports paddle: the lock is taken before that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from oarlock.environment.ranks import is_first_rank
from oarlock.environment.console import get_logger
from oarlock.errors import EnvironmentProblem
from oarlock.train.output.lock_holder import LARGEST, Holder

logger = get_logger(__name__)

LOCK_FILE = ".run.lock"
STALE_AFTER_S = 120.0
_BEAT_S = 15.0
_SETTLED_S = 2.0  # within which a file that was made is also written
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_NO_LOCK_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}


class OutputLock:
    """The lock of a folder, held by this process until release().

    Attributes:
        folder: as it was given.
    """

    def __init__(self, folder: Path, descriptor: int, holder: Holder) -> None:
        self.folder, self._path, self._descriptor, self._holder = folder, folder / LOCK_FILE, descriptor, holder
        self._pid, self._ended = os.getpid(), threading.Event()
        threading.Thread(target=self._run, name="output lock", daemon=True).start()

    def lost(self) -> str | None:
        """Why the folder is no longer this run's (a clause about it); None while it is."""
        try:
            if _is_at(self._path, self._descriptor):
                holder = _read(self._descriptor)
                taken = holder is not None and holder.token != self._holder.token
                return f"was taken over by {holder.in_words}" if holder is not None and taken else None
            if not self._path.exists():
                return "was emptied or replaced by another folder" if self.folder.is_dir() else "was removed"
            holder = _read_at(self._path)
        except OSError as error:
            return f"can't be read any more ({error.strerror})"
        except EnvironmentProblem:
            holder = None
        return f"was taken over by {holder.in_words}" if holder is not None else "was replaced by another folder"

    def release(self) -> None:
        """Remove the file; nothing happens in a process that was forked from the holder."""
        if self._ended.is_set() or os.getpid() != self._pid:
            return
        self._ended.set()
        with contextlib.suppress(OSError):
            if self.lost() is None:
                self._path.unlink()
        os.close(self._descriptor)

    def _run(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with contextlib.suppress(OSError):  # a folder that can't be written is the run's to find
                self.beat()

    def beat(self) -> None:
        """Give a sign of life."""
        holder = _read(self._descriptor)
        if holder is None or holder.token == self._holder.token:
            os.pwrite(self._descriptor, self._holder.alive_at(_now_of(self._descriptor)).text(), 0)


def take(folder: Path) -> OutputLock:
    """Take a folder for this process; it is made if need be.

    Raises:
        EnvironmentProblem: when another run has it, saying who and since when, or it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor, made = _open(folder / LOCK_FILE)
            try:
                holder = _take_file(folder / LOCK_FILE, descriptor, made)
            except BaseException:
                os.close(descriptor)
                raise
            if holder is not None:
                return OutputLock(folder, descriptor, holder)
            os.close(descriptor)  # it was removed meanwhile
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(f"--output_dir {folder}: can't be written: {reason}") from error


def _take_file(path: Path, descriptor: int, made: bool) -> Holder | None:
    """Make an opened lock file ours; None where the folder has another one now, or none."""
    free = _kernel_lock(descriptor)
    if not _is_at(path, descriptor):
        return None
    found = None if made and free is not False else _read_settled(descriptor)
    if found is None and (free is False or (free is None and not made and _age(path) <= STALE_AFTER_S)):
        _refuse(path, None)
    if found is not None:
        if _may_be_alive(found, path, free):
            _refuse(path, found)
        logger.info(f"{path.parent} was in use by {found.in_words}, which is gone: taken over")
        if free is False:  # kept by a lock service for a host that is gone
            path.unlink(missing_ok=True)
            return None
    mine = Holder.this_process(_now_of(descriptor))
    try:
        os.pwrite(descriptor, mine.text(), 0)
        os.ftruncate(descriptor, len(mine.text()))
        os.fsync(descriptor)
    except OSError:
        if made:
            path.unlink(missing_ok=True)
        raise
    if free is None:  # several may have written, one after the other: the last one has it
        time.sleep(_SETTLED_S)
        found = _read(descriptor)
        if found is None or found.token != mine.token:
            _refuse(path, found)
    return mine if _is_at(path, descriptor) else None


def _may_be_alive(holder: Holder, path: Path, free: bool | None) -> bool:
    """Whether the holder of a lock file may still be running.

    Args:
        free: whether the kernel gave its lock, which it does when a process of this machine is gone.
    """
    if not holder.is_of_this_machine:
        return _age(path, holder) <= STALE_AFTER_S
    running = holder.is_running()
    if free is False or running:
        return True
    return running is None and free is None and _age(path, holder) <= STALE_AFTER_S


def _refuse(path: Path, holder: Holder | None) -> NoReturn:
    who, more = "another process", ""
    if holder is not None:
        who = holder.in_words
        if not holder.is_of_this_machine:
            who += f", which gave a sign of life {_age(path, holder):,.0f} s ago,"
            more = f" (after {STALE_AFTER_S:.0f} s without one the folder is free)"
    raise EnvironmentProblem(
        f"--output_dir {path.parent}: {who} is running in this folder; nothing was touched. Wait for its end, stop "
        f"it{more}, or choose another folder"
    )


def _open(path: Path) -> tuple[int, bool]:
    """(descriptor, whether the file was made by this)."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            continue  # removed in between
        except PermissionError:  # another user's, in a folder that both may write into
            holder = _read_at(path)
            if holder is None or _may_be_alive(holder, path, None):
                _refuse(path, holder)
            path.unlink(missing_ok=True)
            continue
        except OSError as error:
            if error.errno in _NO_LOCK_FILE:
                raise EnvironmentProblem(f"{path}: not the lock file of a run; remove it") from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise EnvironmentProblem(f"{path}: not the lock file of a run, which is a regular file; remove it")
        return descriptor, False


def _kernel_lock(descriptor: int) -> bool | None:
    """Whether the kernel gave its lock; None where the file system has none."""
    try:
        # Not flock: that one would be kept by processes that are forked from the holder (those that read data).
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a name is that of an opened file."""
    try:
        found, mine = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _read(descriptor: int) -> Holder | None:
    return Holder.parse(os.pread(descriptor, LARGEST, 0))


def _read_at(path: Path) -> Holder | None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _read_settled(descriptor: int) -> Holder | None:
    """Who wrote a lock file; None where nobody did in the time that it takes (its maker was killed in between)."""
    deadline = time.monotonic() + _SETTLED_S
    while (holder := _read(descriptor)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return holder


def _now_of(descriptor: int) -> float:
    """Now, by the clock that a file gets its times from."""
    os.utime(descriptor)
    return os.fstat(descriptor).st_mtime


def _age(path: Path, holder: Holder | None = None) -> float:
    """Seconds since the last heartbeat in a lock file."""
    last = os.stat(path).st_mtime
    if holder is not None:
        last = min(last, holder.last_beat)
    probe = path.with_name(f".clock-{secrets.token_hex(8)}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - last)
    finally:
        probe.unlink(missing_ok=True)


_held: OutputLock | None = None


@contextlib.contextmanager
def output_held(folder: str | Path) -> Iterator[None]:
    """The folder is this run's in here: of all ranks of one launch, since rank 0 takes it for them.

    Inside another one for the same folder it does nothing.

    Raises:
        EnvironmentProblem: when another run has it, or it can't be written.
    """
    global _held
    if not is_first_rank() or (_held is not None and _held.folder == Path(folder)):
        yield
        return
    lock = _held = take(Path(folder))
    try:
        yield
    finally:
        _held = None
        lock.release()


def held_lock() -> OutputLock | None:
    """The lock of this process's run; None on other ranks than the first."""
    return _held
