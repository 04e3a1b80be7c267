"""Starts the front from the first process, and sends it changes while it runs. Does not import the front."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from oarlock.environment.signals import die_with_parent
from oarlock.serve.config import ServeConfig


def start_front(
    config: ServeConfig,
    keys: Sequence[str],
    sockets: Mapping[str, Sequence[int]] = MappingProxyType({}),
    restarts: Mapping[str, int] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Start the process. It dies with this one, and its output is one pipe. To be called from the main thread.

    Its configuration and keys go through its standard input, so that they are not in arguments, environment or files.

    Args:
        keys: API keys, one of which each request needs; empty for none.
        sockets: descriptors of the listening sockets by port ("openai", "rest", "grpc", "metrics"). The front inherits
            them, so that connections wait while it is restarted.
        restarts: how often each part of the server has been restarted.
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
        pass_fds=[number for found in sockets.values() for number in found],
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    tell_front(process, {"config": config.to_dict(), "keys": keys, "sockets": sockets, "restarts": restarts})
    return process


def tell_front(process: subprocess.Popen[str], content: Mapping[str, Any]) -> None:
    """Send a line of JSON to the front. One that has ended gets nothing."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(content, default=dict) + "\n")
        process.stdin.flush()


def front_mark(run: Path, process: int) -> Path:
    """Path of the file that a front makes when all of its ports are open."""
    return run / f"front-{process}"
