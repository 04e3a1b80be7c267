"""Ending on SIGTERM, and ending with the parent process."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from collections.abc import Iterator

_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec, a child of a process with threads must not load it
_terminated = _deferring = False


def exit_on_sigterm() -> None:
    """Make SIGTERM end the program by SystemExit, so its `finally` blocks run."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def note_sigterm() -> None:
    """Make the next stop_if_terminated() end the program. For programs with a handler of their own."""
    global _terminated
    _terminated = True


def _on_sigterm(*_: object) -> None:
    note_sigterm()
    if not _deferring:
        stop_if_terminated()


@contextlib.contextmanager
def defer_sigterm() -> Iterator[None]:
    """Within this block, SIGTERM takes effect only at stop_if_terminated(), which must be called often.

    An exception of a signal handler is lost if it interrupts a fork hook or a destructor, and leaves locks locked if it
    interrupts a process pool.
    """
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before


def stop_if_terminated() -> None:
    """End the program if SIGTERM was received."""
    if _terminated:
        sys.exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def restore_signals() -> Iterator[None]:
    """On leaving, restore the handlers of SIGTERM and SIGINT, and forget a signal that stopped a run inside."""
    global _terminated
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _terminated = False
        for number, handler in before.items():
            if handler is not None:  # None: it was not set by Python
                signal.signal(number, handler)


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent dies, even by SIGKILL. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        _LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)
