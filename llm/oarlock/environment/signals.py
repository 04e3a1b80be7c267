"""SIGTERM, and child processes that end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from collections.abc import Iterator

_LIBC = ctypes.CDLL(None)  # opened here: a child of a process with threads, before its exec, may do next to nothing
_terminated = _deferring = False


def exit_on_sigterm() -> None:
    """Let SIGTERM end the program through its `finally` blocks (for commands that write files)."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def note_sigterm() -> None:
    """For programs with a handler of their own: the next stop_if_terminated() ends them."""
    global _terminated
    _terminated = True


def _on_sigterm(*_: object) -> None:
    note_sigterm()
    if not _deferring:
        stop_if_terminated()


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[None]:
    """In here SIGTERM takes effect at stop_if_terminated() alone, which has to be called often.

    What a signal handler raises is lost when it interrupts a fork hook or a destructor, and leaves locks taken when it
    interrupts a pool of processes.
    """
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before


def stop_if_terminated() -> None:
    """End the program if SIGTERM came (see deferred_sigterm)."""
    if _terminated:
        sys.exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
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
    """Have the kernel end this process when its parent dies, SIGKILL included (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        _LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)
