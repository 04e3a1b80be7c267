"""Opening and reading untrusted files: only regular files, and never more bytes than a limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from oarlock.errors import ModelError, OarlockError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(path: str | Path, *, error: type[OarlockError] = ModelError) -> BinaryIO:
    """Open a regular file for reading. Links are followed. Pipes and devices are refused without blocking.

    Raises:
        OarlockError: of class `error`, with the path and the reason.
    """
    if "\0" in os.fspath(path):
        raise error(f"{_printable(path)}: a path can't hold a NUL character")
    try:
        _check_regular(
            path, os.stat(path).st_mode, error
        )  # checked before opening, because opening a device can have effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, UnicodeError) as problem:
        raise error(f"{_printable(path)}: {why(problem)}") from problem
    try:
        _check_regular(path, os.fstat(descriptor).st_mode, error)  # and after, because the file may have been replaced
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, *, limit: int, what: str = "file", error: type[OarlockError] = ModelError) -> bytes:
    """Read the content of a regular file.

    Args:
        limit: largest size in bytes.
        what: the kind of file, for the message about one that is too large.

    Raises:
        OarlockError: of class `error`, also if the file is missing.
    """
    with open_regular(path, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            try:
                content = file.read(limit + 1)  # it may grow meanwhile, and files in /proc report size 0
            except OSError as problem:
                raise error(f"{_printable(path)}: {why(problem)}") from problem
            if len(content) <= limit:
                return content
            size = len(content)
    raise error(f"{path}: {size:,} bytes is too large for a {what} (at most {limit:,} are read)")


def read_text(path: str | Path, *, limit: int, what: str = "file", error: type[OarlockError] = ModelError) -> str:
    """Read a text file in UTF-8, with or without a byte order mark. Arguments as in read_bytes.

    Raises:
        OarlockError: also for bytes that are not UTF-8, with their line.
    """
    content = read_bytes(path, limit=limit, what=what, error=error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(f"{path}:{line}: not UTF-8 (byte 0x{content[problem.start]:02x})") from problem


def is_missing(path: str | Path) -> bool:
    """Whether nothing has this name. A dangling link has it: reading that is an error with a reason."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def why(problem: OSError | ValueError) -> str:
    """Describe the reason of a failed system call."""
    if isinstance(problem, OSError):
        if problem.errno == errno.ELOOP:
            return "its symbolic links form a loop"
        return problem.strerror or type(problem).__name__
    return "the name can't be written in the file system's encoding"


def _check_regular(path: str | Path, mode: int, error: type[OarlockError]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise error(f"{_printable(path)}: {kind}, not a regular file")


def _printable(path: str | Path) -> str:
    return os.fspath(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
