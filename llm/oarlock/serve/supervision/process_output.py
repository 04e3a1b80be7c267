"""Prints the output of a server and its child processes. The server continues when it can't be written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

# Lines of Triton (at every start without a GPU) and of Paddle that no user can act on.
_NOISE = (
    "Unable to allocate pinned system memory",
    "CUDA memory pool disabled",
    "HandleCancellation called even when the context was not cancelled",  # for each stream that ended with an error
    "CudaDriverHelper has not been initialized",
    "DCGM unable to start",
    "Signal (15) received",
    "Non-graceful termination detected",  # of a process that is ended when all is answered
    "Failed to initialize NVML",
    "NODELAY NOT SUPPORTED",  # of a Unix socket
    "No ccache found",
    "warnings.warn(warning_message)",
    "Setuptools is replacing distutils",
)


def follow(process: subprocess.Popen[str], name: str, is_hidden: Callable[[], bool]) -> threading.Thread:
    """Print each line of a process with a prefix, in a thread, until the process ends.

    Args:
        is_hidden: whether lines are left out now.
    """

    def echo() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.strip() and not is_hidden() and not any(words in line for words in _NOISE):
                    print(f"{name}: {line.rstrip()}", flush=True)

    thread = threading.Thread(target=echo, name=f"{name}-log", daemon=True)
    thread.start()
    return thread


class _Lossy:
    """A stream of text that drops what can't be written, because the disk is full or the reader has ended."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def drop_unwritable_output() -> Iterator[None]:
    """Let standard output and error drop what can't be written: a server continues without its log.

    If a thread of follow() ended, its process would wait for ever when the pipe is full.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Lossy(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except OSError:  # drop the rest, since Python tries once more when it exits
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
