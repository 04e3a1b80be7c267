"""`oarlock serve`: Triton and the OpenAI-compatible endpoint as one tree of processes.

    oarlock serve ── tritonserver ── a process for each Python model (one has the engine)
                 ├── uvicorn: asks Triton over gRPC
                 └── guardian: clears up behind all of them

SIGTERM and Ctrl-C come to the first alone: it has the endpoint finish what is open, then Triton. When it is killed, the
kernel kills Triton and uvicorn, and the guardian what is left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from oarlock.environment import say
from oarlock.errors import ConfigError, EnvironmentProblem
from oarlock.serve.guardian import end_guardian, start_guardian
from oarlock.serve.openai_process import read_keys
from oarlock.serve.options import ServeOptions
from oarlock.serve.process_tree import ProcessTree
from oarlock.serve.repository import engine_settings, repository_models
from oarlock.serve.triton_server import (
    ADMIN_HEADER,
    Installation,
    TritonOptions,
)

_LOOK_SECONDS = 0.1
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(options: ServeOptions) -> int:
    """Until SIGTERM or Ctrl-C; 0 when all that was in flight was answered.

    Raises:
        OarlockError: when it can't start, or a part of it ends by itself.
    """
    installation = Installation.find()
    models = repository_models(options.repository)
    engine_settings(options.repository, options.limits)  # what it refuses is refused now
    if options.api_key_file:
        read_keys(options.api_key_file)
    triton_host = options.triton_host or ("127.0.0.1" if options.api_key_file else options.host)
    _check_ports(options, triton_host)
    admin_key = _admin_key(options, triton_host)
    run = Path(tempfile.mkdtemp(prefix="oarlock-serve-"))
    triton = TritonOptions(
        repository=options.repository.resolve(),
        models=models,
        host=triton_host,
        ports=options.ports,
        limits=options.limits,
        run=run,
        memory_prefix=f"oarlock-serve-{os.getpid()}-",
        admin_key=admin_key,
        drain_seconds=options.drain_seconds,
        verbose=options.verbose,
    )
    with _stop_signals() as stopped:
        guardian = start_guardian(triton.memory_prefix, [run, *filter(None, [options.temporary])])
        tree = ProcessTree(installation, triton, options)
        try:
            tree.start(stopped, guardian)
            while not stopped:
                tree.check()
                time.sleep(_LOOK_SECONDS)
            return tree.drain(stopped)
        finally:
            tree.end()
            end_guardian(guardian)


def _admin_key(options: ServeOptions, host: str) -> str:
    """What loading and unloading asks for: nothing on loopback, else the key of the file, or one that nobody knows."""
    if options.admin_key_file:
        return read_keys(options.admin_key_file)[0]
    if host in _LOOPBACK:
        return ""
    say(f"Triton is open on {host}: models can't be loaded there (--admin-key-file, header {ADMIN_HEADER})")
    return secrets.token_hex(16)


def _check_ports(options: ServeOptions, triton_host: str) -> None:
    ports = options.ports
    wanted = [
        ("--grpc-port", triton_host, ports.grpc),
        ("--rest-port", triton_host, ports.rest),
        ("--metrics-port", triton_host, ports.metrics),
        ("--port", options.host, ports.openai),
    ]
    seen: dict[int, str] = {}
    for flag, host, port in wanted:
        if port in seen:
            raise ConfigError(f"{flag} {port}: {seen[port]} has the same port")
        seen[port] = flag
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            reason = "the port is taken" if error.errno == 98 else error.strerror or str(error)
            raise EnvironmentProblem(f"{flag} {port} on {host}: {reason}; give another one") from error


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals that came, while in here."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
