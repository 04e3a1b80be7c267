"""The output of a server and its child processes, line by line. The server goes on when it can't be written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

# Lines of every start of Triton on a machine without a GPU, and of Paddle, that no user can act on.
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


def follow(process: subprocess.Popen[str], name: str, is_known: Callable[[], bool]) -> threading.Thread:
    """Print each line with a name before it, until the process ends.

    Args:
        is_known: whether lines are left out now, since they say again what was said.
    """

    def echo() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.strip() and not is_known() and not any(words in line for words in _NOISE):
                    print(f"{name}: {line.rstrip()}", flush=True)

    thread = threading.Thread(target=echo, name=f"{name}-log", daemon=True)
    thread.start()
    return thread


class _Lossy:
    """A stream of text that leaves out what can't be written: the disk is full, or who read it is gone."""

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
def lossy_output() -> Iterator[None]:
    """Standard output and error that never fail in here: a server answers on without its log.

    A thread of follow() that ended would be worse than a lost line: its process waits for ever when the pipe is full.
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
            except OSError:  # what is left of it is thrown away, since Python tries once more at its end
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
