"""The folder of a running server: its sockets, and what its processes note for each other. Imports little.

Triton's models find it by the variable OARLOCK_SERVE_RUN. They note there how many requests are open, and why a model
does not load.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from oarlock.errors import EnvironmentProblem
from oarlock.files import write_text_atomically

ADMIN_SOCKET = "admin"
RUN_VARIABLE = "OARLOCK_SERVE_RUN"
_PREFIX = "oarlock-serve-"
_LONGEST = 100  # bytes of a Unix socket's path: the kernel takes 107
_FAILURE_FILE = "failure.txt"


def make_run_folder(opened: contextlib.ExitStack) -> Path:
    """Make a folder of mode 0700 that is removed at the end, if the guardian has not removed it.

    Raises:
        EnvironmentProblem: when no folder for temporary files has a path that is short enough for sockets.
    """
    for place in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        if len(os.fsencode(place)) + len(_PREFIX) + 24 < _LONGEST and os.access(place, os.W_OK):
            run = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            opened.callback(shutil.rmtree, run, ignore_errors=True)
            return run
    raise EnvironmentProblem(f"{tempfile.gettempdir()}: too long a path for Unix sockets; set TMPDIR to a shorter one")


def find_admin_sockets() -> list[Path]:
    """The administration sockets of this user's servers, also of those that were killed."""
    found = []
    for place in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        for path in sorted(Path(place).glob(f"{_PREFIX}*/{ADMIN_SOCKET}")):
            with contextlib.suppress(OSError):
                state = path.lstat()
                owners = {path.parent.lstat().st_uid, state.st_uid}
                if stat.S_ISSOCK(state.st_mode) and owners == {os.geteuid()}:
                    found.append(path)
    return found


def open_busy_file(process: int) -> int | None:
    """A descriptor to write the number of open requests to; None if this process has no server."""
    run = os.environ.get(RUN_VARIABLE)
    return os.open(Path(run) / f"busy-{process}", os.O_CREAT | os.O_WRONLY, 0o600) if run else None


def count_busy(run: Path) -> int:
    """Open requests of all models of a server whose processes are alive."""
    total = 0
    for path in run.glob("busy-*"):
        if Path("/proc", path.name.removeprefix("busy-")).exists():
            total += int(path.read_text() or 0)
    return total


def write_failure(text: str) -> None:
    """Note why the model does not load, for the server."""
    run = os.environ.get(RUN_VARIABLE)
    if run:
        write_text_atomically(Path(run) / _FAILURE_FILE, text)


def read_failure(run: Path, *, forget: bool = False) -> str:
    """Read why the model does not load; "" if nothing was noted.

    Args:
        forget: delete the note.
    """
    path = run / _FAILURE_FILE
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    if forget:
        path.unlink(missing_ok=True)
    return text


def forget_models(run: Path) -> None:
    """Delete the notes of the models of a Triton that has ended."""
    for path in (*run.glob("busy-*"), run / _FAILURE_FILE):
        path.unlink(missing_ok=True)
