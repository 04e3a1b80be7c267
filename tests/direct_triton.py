"""Triton without the front: with its own HTTP port next to its gRPC socket."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from helpers import free_ports
from oarlock.serve.config import ServeConfig, TritonConfig
from oarlock.serve.supervision.guardian import clean_up
from oarlock.serve.triton import server
from oarlock.serve.triton.served_repository import make_served_tree

MODELS = ("oarlock", "oarlock_infer", "oarlock_json")
GUARD_S = 600


@dataclass(frozen=True)
class DirectTriton:
    """HOST:PORT of Triton's HTTP, and the folder with its socket."""

    rest: str
    run: str


@contextlib.contextmanager
def direct_triton(repository: Path, run: Path) -> Iterator[DirectTriton]:
    """Start Triton on an export; `run` is a new folder."""
    run.mkdir(mode=0o700)
    make_served_tree(repository, run / "models")
    triton = TritonConfig(models=MODELS, run=str(run), memory_prefix=f"oarlock-direct-{os.getpid()}-")
    (port,) = free_ports(1)
    flags = server._flags

    def with_http(*given):
        return [word for word in flags(*given) if word != "--allow-http=false"] + [
            "--http-address=127.0.0.1",
            f"--http-port={port}",
        ]

    said: list[str] = []
    # Without a server folder its models check requests themselves; under `oarlock serve` the front checks them.
    with mock.patch.object(server, "_flags", with_http), mock.patch.object(server, "RUN_VARIABLE", "OARLOCK_TESTS_RUN"):
        process = server.start_triton(server.Installation.find(), ServeConfig(triton=triton, drain_seconds=1), MODELS)
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + GUARD_S
        while not _is_ready(port):
            assert process.poll() is None and time.monotonic() < deadline, "".join(said)
            time.sleep(0.1)
        yield DirectTriton(f"127.0.0.1:{port}", str(run))
    finally:
        process.terminate()
        process.wait(GUARD_S)
        clean_up({process.pid}, triton.memory_prefix, ())


def _is_ready(port: int) -> bool:
    import http.client

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as client, contextlib.suppress(OSError):
        client.request("GET", "/v2/health/ready")
        return client.getresponse().status == 200
    return False
