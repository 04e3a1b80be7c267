"""The processes of Triton's Python models, watched from outside: Triton does not notice when one has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from oarlock.environment.processes import process_start_time, read_process_fields

_SESSION_FIELD = 3  # of /proc/PID/stat, after the name: state, parent, group, session
_POLL_SECONDS = 0.2


def list_session_processes(sessions: set[int]) -> Iterator[int]:
    """List the running processes of sessions, without dead ones that their parents have not collected."""
    for folder in Path("/proc").glob("[0-9]*"):
        words = read_process_fields(int(folder.name))
        if words and int(words[_SESSION_FIELD]) in sessions:
            yield int(folder.name)


def is_alive(process: int) -> bool:
    return bool(read_process_fields(process))


def find_model_processes(triton: int, models: Mapping[str, Path]) -> dict[int, str]:
    """Find the processes of models: number -> name of its model.

    Args:
        triton: leader of the session.
        models: name -> path of its model.py, which is in the command line of its processes.
    """
    found = {}
    paths = {str(path): name for name, path in models.items()}
    for process in list_session_processes({triton}):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            name = next((paths[word] for word in words if word in paths), None)
            if name is not None:
                found[process] = name
    return found


def kill_stragglers(processes: Iterable[int], seconds: float) -> int:
    """Wait for the old processes of a model that was loaded again, and kill those left after so many seconds.

    If one was killed during a request, Triton (24.10) waits for its answer for ever, and never ends the others. Returns
    how many were killed.
    """
    started = {process: start for process in processes if (start := process_start_time(process)) is not None}
    deadline = time.monotonic() + seconds
    while True:
        # The number may be another process's by now; the start time shows it.
        left = [process for process, start in started.items() if process_start_time(process) == start]
        if not left or time.monotonic() >= deadline:
            break
        time.sleep(_POLL_SECONDS)
    for process in left:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    return len(left)
