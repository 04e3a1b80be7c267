"""Processes of Triton's models that do not exit after a reload."""

from __future__ import annotations

import signal
import subprocess
import sys

from oarlock.serve.triton.backend_processes import is_alive, kill_stragglers


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def test_leftover_processes_are_killed():
    left, gone = _sleeper(), _sleeper()
    try:
        gone.kill()
        gone.wait()
        assert kill_stragglers([left.pid, gone.pid], 0.3) == 1
        assert left.wait(60) == -signal.SIGKILL
        assert not is_alive(left.pid)
    finally:
        left.kill()


def test_processes_that_end_themselves_are_awaited():
    ends = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    assert kill_stragglers([ends.pid], 600) == 0
    assert ends.wait(60) == 0
