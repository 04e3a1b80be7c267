"""Processes of Triton's Python models end when Triton is killed.

Triton's own end of such a process waits for Python threads that never end by themselves. (PR_SET_PDEATHSIG is no way
out: it goes by the thread that made the process, which in Triton has ended by then.)
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

_LOOK_SECONDS = 0.25
_REGION_WORD = 2  # of the process's own command line: the name of its shared memory


def end_with_parent() -> None:
    """From now on: leave, and remove the shared memory of this process, when its parent is another one."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
        if len(words) > _REGION_WORD and b"/" not in words[_REGION_WORD] and words[_REGION_WORD]:
            Path("/dev/shm", os.fsdecode(words[_REGION_WORD])).unlink(missing_ok=True)
        os._exit(1)

    if sys.platform == "linux":
        threading.Thread(target=look, name="oarlock-orphan", daemon=True).start()
