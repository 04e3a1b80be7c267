"""Processes started by a launch: what they recorded, and which still run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from helpers import ROOT

LAUNCHER = str(ROOT / "tests" / "support" / "small_launcher.py")
SUPERVISE = str(ROOT / "tests" / "support" / "supervise.py")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition for up to a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def read_starts(folder: Path) -> list[list[str]]:
    """The arguments of each start of small_launcher.py."""
    return [json.loads(line) for line in (folder / "starts").read_text().splitlines()]


def list_names(folder: Path, pattern: str) -> list[str]:
    """Names of the matching files, sorted."""
    return sorted(path.name for path in folder.glob(pattern))


def find_leftover_processes(folder: Path) -> list[psutil.Process]:
    """Processes that still run and have this folder among their arguments."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(folder) in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
