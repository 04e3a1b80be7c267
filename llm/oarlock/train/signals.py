"""SIGTERM and Ctrl-C: finish the step, save, leave with code 0."""

from __future__ import annotations

import signal
from types import FrameType

from oarlock.environment import say


class StopRequest:
    """Set by the first SIGTERM or SIGINT; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self.name = ""

    def install(self) -> StopRequest:
        """Take over both signals (in the main thread, after imports that set their own handlers)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name
        say(f"{self.name}: finishing this step, then saving (Ctrl-C again stops without saving)")
