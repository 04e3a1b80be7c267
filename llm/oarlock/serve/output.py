"""What the children of a server say, as lines of the server's own output."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable

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
