"""One run per output_dir: a lock file names the process and host that hold the folder, and since when.

Two mechanisms protect the folder. The kernel's lock on the file (fcntl; on NFS its lock service) is released the
moment a process ends. The heartbeat in the file serves file systems and hosts that the kernel's lock does not cover. A
lock is taken over when its holder can't be alive: on the same machine if no process has that id and start time, on
another machine if there was no heartbeat for two minutes. Ages are measured by the file system's clock alone, so
machines whose clocks differ do no harm.

Nothing here imports paddle: the lock is acquired before that.
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

from oarlock.environment.console import get_logger
from oarlock.environment.ranks import is_first_rank
from oarlock.errors import EnvironmentProblem
from oarlock.train.output.lock_holder import LARGEST, Holder

logger = get_logger(__name__)

LOCK_FILE = ".run.lock"
STALE_AFTER_S = 120.0
_BEAT_S = 15.0
_SETTLED_S = 2.0  # a new lock file is written within this time
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_NO_LOCK_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}


class OutputLock:
    """The lock of a folder, held by this process until release()."""

    def __init__(self, folder: Path, descriptor: int, holder: Holder) -> None:
        self.folder, self._path, self._descriptor, self._holder = folder, folder / LOCK_FILE, descriptor, holder
        self._pid, self._ended = os.getpid(), threading.Event()
        threading.Thread(target=self._beat_until_released, name="output lock", daemon=True).start()

    def find_loss(self) -> str | None:
        """Find out what happened to the folder, as a predicate ("was removed"); None while it is still this run's."""
        try:
            if _is_at(self._path, self._descriptor):
                holder = _read(self._descriptor)
                taken = holder is not None and holder.token != self._holder.token
                return f"was taken over by {holder.in_words}" if holder is not None and taken else None
            if not self._path.exists():
                return "was emptied or replaced by another folder" if self.folder.is_dir() else "was removed"
            holder = _read_at(self._path)
        except OSError as error:
            return f"has become unreadable ({error.strerror})"
        except EnvironmentProblem:
            holder = None
        return f"was taken over by {holder.in_words}" if holder is not None else "was replaced by another folder"

    def release(self) -> None:
        """Delete the lock file. Does nothing in a forked child of the holder."""
        if self._ended.is_set() or os.getpid() != self._pid:
            return
        self._ended.set()
        with contextlib.suppress(OSError):
            if self.find_loss() is None:
                self._path.unlink()
        os.close(self._descriptor)

    def _beat_until_released(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with contextlib.suppress(OSError):  # the run will notice that the folder can't be written
                self.write_heartbeat()

    def write_heartbeat(self) -> None:
        """Update the heartbeat in the lock file."""
        holder = _read(self._descriptor)
        if holder is None or holder.token == self._holder.token:
            os.pwrite(self._descriptor, self._holder.with_heartbeat(_file_system_time(self._descriptor)).to_bytes(), 0)


def acquire_lock(folder: Path) -> OutputLock:
    """Lock a folder for this process; create it if necessary.

    Raises:
        EnvironmentProblem: if another run holds it, naming that run, or if it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor, created = _open(folder / LOCK_FILE)
            try:
                holder = _claim_file(folder / LOCK_FILE, descriptor, created)
            except BaseException:
                os.close(descriptor)
                raise
            if holder is not None:
                return OutputLock(folder, descriptor, holder)
            os.close(descriptor)  # the file was deleted in the meantime
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(f"--output_dir {folder}: can't be written: {reason}") from error


def _claim_file(path: Path, descriptor: int, created: bool) -> Holder | None:
    """Make an opened lock file ours; None if the folder now has another one, or none.

    Args:
        created: the file was created by this process.
    """
    free = _try_kernel_lock(descriptor)
    if not _is_at(path, descriptor):
        return None
    found = None if created and free is not False else _read_settled(descriptor)
    if found is None and (
        free is False or (free is None and not created and _seconds_since_heartbeat(path) <= STALE_AFTER_S)
    ):
        _refuse(path, None)
    if found is not None:
        if _may_be_alive(found, path, free):
            _refuse(path, found)
        logger.info(f"{path.parent} was held by {found.in_words}, which no longer runs: taking it over")
        if free is False:  # a lock service still keeps the lock of a dead host
            path.unlink(missing_ok=True)
            return None
    mine = Holder.this_process(_file_system_time(descriptor))
    try:
        os.pwrite(descriptor, mine.to_bytes(), 0)
        os.ftruncate(descriptor, len(mine.to_bytes()))
        os.fsync(descriptor)
    except OSError:
        if created:
            path.unlink(missing_ok=True)
        raise
    if free is None:  # several processes may have written; the last one gets the lock
        time.sleep(_SETTLED_S)
        found = _read(descriptor)
        if found is None or found.token != mine.token:
            _refuse(path, found)
    return mine if _is_at(path, descriptor) else None


def _may_be_alive(holder: Holder, path: Path, free: bool | None) -> bool:
    """Tell whether the holder of a lock file may still be running.

    Args:
        free: whether the kernel granted its lock (it does once a holder on this machine has ended).
    """
    if not holder.is_of_this_machine:
        return _seconds_since_heartbeat(path, holder) <= STALE_AFTER_S
    running = holder.is_running()
    if free is False or running:
        return True
    return running is None and free is None and _seconds_since_heartbeat(path, holder) <= STALE_AFTER_S


def _refuse(path: Path, holder: Holder | None) -> NoReturn:
    who, more = "another process", ""
    if holder is not None:
        who = holder.in_words
        if not holder.is_of_this_machine:
            who += f" (last heartbeat {_seconds_since_heartbeat(path, holder):,.0f} s ago)"
            more = f" (the folder is released {STALE_AFTER_S:.0f} s after the last heartbeat)"
    raise EnvironmentProblem(
        f"--output_dir {path.parent}: {who} is running in this folder. Nothing was changed. Wait until it ends, stop "
        f"it{more}, or choose another folder"
    )


def _open(path: Path) -> tuple[int, bool]:
    """Open or create a lock file; returns its descriptor, and whether it was created."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            continue  # deleted in the meantime
        except PermissionError:  # another user's file, in a folder that both can write
            holder = _read_at(path)
            if holder is None or _may_be_alive(holder, path, None):
                _refuse(path, holder)
            path.unlink(missing_ok=True)
            continue
        except OSError as error:
            if error.errno in _NO_LOCK_FILE:
                raise EnvironmentProblem(f"{path}: not a lock file of a run; delete it") from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise EnvironmentProblem(f"{path}: a lock file is a regular file, which this is not; delete it")
        return descriptor, False


def _try_kernel_lock(descriptor: int) -> bool | None:
    """Try to get the kernel's lock; None if the file system has no locks."""
    try:
        # Not flock, which forked children of the holder (data loading workers) would keep.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Tell whether a path is that of an open file."""
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
    """Read the holder, waiting until it is written; None if it is not (its creator was killed in between)."""
    deadline = time.monotonic() + _SETTLED_S
    while (holder := _read(descriptor)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return holder


def _file_system_time(descriptor: int) -> float:
    """The current time by the file system's clock."""
    os.utime(descriptor)
    return os.fstat(descriptor).st_mtime


def _seconds_since_heartbeat(path: Path, holder: Holder | None = None) -> float:
    """Seconds since the last heartbeat, by the file system's clock."""
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
def hold_output_lock(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder; rank 0 does so for all ranks of a launch. Nested calls for one folder do nothing.

    Raises:
        EnvironmentProblem: if another run holds the folder, or it can't be written.
    """
    global _held
    if not is_first_rank() or (_held is not None and _held.folder == Path(folder)):
        yield
        return
    lock = _held = acquire_lock(Path(folder))
    try:
        yield
    finally:
        _held = None
        lock.release()


def current_lock() -> OutputLock | None:
    """The lock of this process's run; None on ranks other than the first."""
    return _held
