"""A process of the server that is restarted when it ends by itself, after growing pauses."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

FIRST_PAUSE, LONGEST_PAUSE, HEALTHY_SECONDS = 0.2, 30.0, 60.0


class RestartingProcess:
    """A process and its restarts.

    Attributes:
        name: for people.
        process: the current or last one.
        restarts: number of restarts.
        is_up: it has answered since its start.
    """

    def __init__(self, name: str, start: Callable[[], subprocess.Popen[str]]) -> None:
        """Args: start: starts the process."""
        self.name, self._start = name, start
        self.process: subprocess.Popen[str] | None = None
        self.restarts = 0
        self.is_up = False
        self._pause = FIRST_PAUSE
        self._due: float | None = None  # time of the next start
        self._began = self._up_since = 0.0

    def start(self) -> None:
        """Start the process, for the first time or again."""
        self.is_up, self._due = False, None
        self._began = time.monotonic()
        self.process = self._start()

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def waits(self) -> bool:
        """The process has ended and will be restarted."""
        return self._due is not None

    @property
    def seconds(self) -> float:
        """Seconds since the last start."""
        return time.monotonic() - self._began

    def note_up(self) -> None:
        """Note that the process answers."""
        if not self.is_up:
            self.is_up, self._up_since = True, time.monotonic()

    def note_end(self) -> float:
        """Note that the process has ended. Returns the seconds before its next start: twice the last
        pause, or the first one after a healthy minute."""
        now = time.monotonic()
        if self.is_up and now - self._up_since >= HEALTHY_SECONDS:
            self._pause = FIRST_PAUSE
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self.is_up, self._due = False, now + pause
        return pause

    def restart_if_due(self) -> bool:
        """Restart the process if its pause is over. Returns whether it did."""
        if self._due is None or time.monotonic() < self._due:
            return False
        self.restarts += 1
        self.start()
        return True

    def describe_end(self) -> str:
        """Describe how the process ended."""
        code = self.process.poll() if self.process else None
        if code is None:
            return "ended by this server"
        return f"signal {-code}" if code < 0 else f"code {code}"

    def kill(self) -> None:
        """Kill the process and wait until it is gone."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
