"""Open and read files that others named or wrote: regular files alone, and never more bytes than agreed."""

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
    """Open a file for reading; links are followed, and anything but a regular file is refused without waiting for it.

    Raises:
        OarlockError: of the class given, naming the path and what is wrong with it.
    """
    if "\0" in os.fspath(path):
        raise error(f"{_printable(path)}: a path can't hold a NUL character")
    try:
        _check_regular(path, os.stat(path).st_mode, error)  # before: opening a device may already do something
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, UnicodeError) as problem:
        raise error(f"{_printable(path)}: {why(problem)}") from problem
    try:
        _check_regular(path, os.fstat(descriptor).st_mode, error)  # after: it may have been replaced in between
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, *, limit: int, what: str = "file", error: type[OarlockError] = ModelError) -> bytes:
    """The whole content of a regular file.

    Args:
        limit: the most bytes that it may have.
        what: what it should be, for the message about a file that is too large.

    Raises:
        OarlockError: of the class given; also for a file that is missing.
    """
    with open_regular(path, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            try:
                content = file.read(limit + 1)  # it may grow meanwhile, and the size of some is 0 (/proc)
            except OSError as problem:
                raise error(f"{_printable(path)}: {why(problem)}") from problem
            if len(content) <= limit:
                return content
            size = len(content)
    raise error(f"{path}: {size:,} bytes is too large for a {what} (at most {limit:,} are read)")


def read_text(path: str | Path, *, limit: int, what: str = "file", error: type[OarlockError] = ModelError) -> str:
    """As read_bytes, of a text in UTF-8, with or without its mark (BOM).

    Raises:
        OarlockError: also for bytes that are no UTF-8, with their line.
    """
    content = read_bytes(path, limit=limit, what=what, error=error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(f"{path}:{line}: not UTF-8 (byte 0x{content[problem.start]:02x})") from problem


def is_missing(path: str | Path) -> bool:
    """Whether nothing has this name. A link to nothing has it, so reading that is an error with a reason."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def why(problem: OSError | ValueError) -> str:
    """The reason of a failed system call, in words."""
    if isinstance(problem, OSError):
        if problem.errno == errno.ELOOP:
            return "its links lead in a circle"
        return problem.strerror or type(problem).__name__
    return "the name can't be written in the file system's encoding"


def _check_regular(path: str | Path, mode: int, error: type[OarlockError]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise error(f"{_printable(path)}: {kind}, not a regular file")


def _printable(path: str | Path) -> str:
    return os.fspath(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
