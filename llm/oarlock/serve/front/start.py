"""Starts the front from the first process, and sends it changes while it runs. Does not import the front."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from oarlock.environment.signals import die_with_parent
from oarlock.serve.front.options import FrontOptions


def start_front(options: FrontOptions) -> subprocess.Popen[str]:
    """The process; it dies with this one, and its output is one pipe. Call it from the main thread.

    What it has to know comes through its standard input: nothing of it is in arguments, environment or files.
    """
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "oarlock.serve.front.process"],
        # gRPC would write a line for much that a client does wrong.
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "GRPC_VERBOSITY": "NONE"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[number for found in options.sockets.values() for number in found],
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    tell_front(process, options.to_json())
    return process


def tell_front(process: subprocess.Popen[str], line: str) -> None:
    """A line of JSON; one that has ended hears nothing."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line + "\n")
        process.stdin.flush()


def front_mark(run: Path, process: int) -> Path:
    """The file that a front makes when all of its ports are open."""
    return run / f"front-{process}"
