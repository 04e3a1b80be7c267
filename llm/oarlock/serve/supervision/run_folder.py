"""The folder of a running server: its sockets, and what its processes tell each other. Imports little."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from oarlock.errors import EnvironmentProblem

ADMIN_SOCKET = "admin"
_PREFIX = "oarlock-serve-"
_LONGEST = 100  # bytes of a Unix socket's path: the kernel takes 107


def make_run_folder(opened: contextlib.ExitStack) -> Path:
    """A new one, of mode 0700; removed at the end, in so far as the guardian has not.

    Raises:
        EnvironmentProblem: when no place for temporary files has a path that is short enough for sockets.
    """
    for place in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        if len(os.fsencode(place)) + len(_PREFIX) + 24 < _LONGEST and os.access(place, os.W_OK):
            run = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            opened.callback(shutil.rmtree, run, ignore_errors=True)
            return run
    raise EnvironmentProblem(f"{tempfile.gettempdir()}: too long a path for Unix sockets; set TMPDIR to a shorter one")


def admin_sockets() -> list[Path]:
    """Of the servers of this user that run here, or were killed."""
    found = []
    for place in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        for path in sorted(Path(place).glob(f"{_PREFIX}*/{ADMIN_SOCKET}")):
            with contextlib.suppress(OSError):
                state = path.lstat()
                owners = {path.parent.lstat().st_uid, state.st_uid}
                if stat.S_ISSOCK(state.st_mode) and owners == {os.geteuid()}:
                    found.append(path)
    return found
