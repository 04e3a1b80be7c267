"""SIGTERM and Ctrl-C: finish the step, save, exit with code 0."""

from __future__ import annotations

import signal
from types import FrameType

from oarlock.environment.console import get_logger
from oarlock.environment.signals import note_sigterm

logger = get_logger(__name__)


class StopRequest:
    """Set by the first SIGTERM or SIGINT; a second SIGINT interrupts at once.

    Before training, data preparation stops as well (see stop_if_terminated).
    """

    def __init__(self) -> None:
        self.requested = self.training = False
        self.name = ""

    def install(self) -> StopRequest:
        """Install the handlers, in the main thread and after imports that install their own."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        note_sigterm()
        self.requested, self.name = True, signal.Signals(number).name
        what = "finishing this step, then saving" if self.training else "stopping"
        logger.info(f"{self.name}: {what} (Ctrl-C again stops without saving)")
