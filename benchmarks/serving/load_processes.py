"""The processes of a server, and the threads, files and memory of each."""

from __future__ import annotations

import contextlib
import time

import psutil

_NAMES = {
    "oarlock.serve.front.process": "front",
    "oarlock.serve.supervision.guardian": "guardian",
    "tritonserver": "triton",
    "/oarlock_infer/": "oarlock_infer",
    "/oarlock_json/": "oarlock_json",
    "/oarlock/": "engine",
}


def processes(first: int) -> dict[str, psutil.Process]:
    """The processes of a server, by name."""
    found = {"first": psutil.Process(first)}
    for process in found["first"].children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = " ".join(process.cmdline())
            name = next((name for part, name in _NAMES.items() if part in words), "other")
            while name in found:
                stem, _, number = name.partition(" ")
                name = f"{stem} {int(number or 1) + 1}"
            found[name] = process
    return found


def held(first: int) -> dict[str, tuple[int, int]]:
    """Threads and open files of each process."""
    return {name: (process.num_threads(), process.num_fds()) for name, process in processes(first).items()}


def resident(first: int) -> dict[str, float]:
    """MB of each process."""
    return {name: process.memory_info().rss / 2**20 for name, process in processes(first).items()}


def settled(first: int, seconds: float = 60.0) -> dict[str, tuple[int, int]]:
    """Threads and open files once they have not changed for three seconds. Idle connections end by then."""
    deadline, found = time.monotonic() + seconds, held(first)
    since = time.monotonic()
    while time.monotonic() - since < 3.0 and time.monotonic() < deadline:
        time.sleep(0.25)
        now = held(first)
        if now != found:
            found, since = now, time.monotonic()
    return found
