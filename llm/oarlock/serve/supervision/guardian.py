"""A small process that outlives `oarlock serve`: however the server ends, nothing of it is left.

    python -m oarlock.serve.supervision.guardian PREFIX FOLDER...

It reads the number of Triton's session from standard input, again whenever Triton is restarted. When the input ends
(the server has ended, or was killed), it kills what is left of the last session, and removes the shared memory under
PREFIX and the folders. (Triton's Python models may wait for a dead Triton for ever, holding Python's lock, so that
nothing inside of them can notice.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from oarlock.serve.supervision.private_memory import SHARED_MEMORY
from oarlock.serve.triton.backend_processes import list_session_processes

_SECONDS = 20


def start_guardian(memory_prefix: str, folders: Sequence[Path]) -> subprocess.Popen[str]:
    """Start the process, before there is anything to guard. end_guardian() ends it."""
    package = str(Path(__file__).resolve().parents[3])
    words = [sys.executable, "-m", "oarlock.serve.supervision.guardian", memory_prefix, *map(str, folders)]
    # A session of its own: Ctrl-C, and signals to the server's group, do not reach it.
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": package}
    )


def guard_session(guardian: subprocess.Popen[str], session: int) -> None:
    """Give the guardian the session to end, in place of the former one; 0 for none."""
    assert guardian.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it was killed; the next one gets the number
        guardian.stdin.write(f"{session}\n")
        guardian.stdin.flush()


def end_guardian(guardian: subprocess.Popen[str]) -> None:
    """Have the guardian clean up, and wait for that."""
    assert guardian.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it was killed
        guardian.stdin.close()
    guardian.wait()


def clean_up(sessions: set[int], memory_prefix: str, folders: Sequence[Path]) -> None:
    """Kill what is left of sessions, then remove their shared memory and folders."""
    deadline = time.monotonic() + _SECONDS
    while (left := list(list_session_processes(sessions))) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    for path in SHARED_MEMORY.glob(f"{memory_prefix}*"):
        path.unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Wait for the end of standard input, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    memory_prefix, folders = sys.argv[1], [Path(word) for word in sys.argv[2:]]
    session = 0
    for line in sys.stdin:
        session = int(line)
    clean_up({session} - {0}, memory_prefix, folders)


if __name__ == "__main__":
    main()
