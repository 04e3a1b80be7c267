"""The front: `python -m oarlock.serve.front.process`, started by the first process, which speaks to it on its stdin.

The first line is {"config", "keys", "sockets", "restarts"}. Further lines change the keys, {"keys": [...]}, or the
counts of restarts, {"restarts": {...}}. One event loop serves all four ports. On SIGTERM it answers the open requests,
within `drain_seconds`. The end of stdin means that the first process has ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oarlock.serve.config import ServeConfig
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.grpc.server import make_grpc_server
from oarlock.serve.front.http.guard import ErrorResponse
from oarlock.serve.front.http.server import HttpServer, guard_app, make_http_server
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.metrics import FrontCounts, make_metrics_app
from oarlock.serve.front.openai.app import make_openai_app
from oarlock.serve.front.openai.errors import make_error_body, make_error_response
from oarlock.serve.front.rest.routes import HEALTH_PATHS, make_rest_app, make_rest_error
from oarlock.serve.front.start import front_mark
from oarlock.serve.triton.client import TritonClient

_LINE_BYTES = 4 << 20  # keys may be many
_POLL_SECONDS = 0.05


class Front:
    """The four ports, in one event loop."""

    def __init__(self, config: ServeConfig, keys: Sequence[str], restarts: Mapping[str, int]) -> None:
        """Make the ports. To be called inside the loop."""
        self._config = config
        self._keys = Keys(keys)
        self._counts = FrontCounts(restarts)
        self._triton = TritonClient(f"unix:{config.triton.grpc_socket}")
        self._admission = Admission(config.max_open, config.max_open_per_client)
        self._stopping = asyncio.Event()
        self._grpc = make_grpc_server(config, self._triton, self._keys, self._admission, self._counts)

        front, triton = config.front, self._triton

        def behind_guard(app: Any, door: str, write_error: ErrorResponse, **more: Any) -> Any:
            app = guard_app(app, config, self._keys, self._admission, write_error, **more)
            return self._counts.count_requests(app, door)

        openai = behind_guard(
            make_openai_app(config, triton, with_keys=bool(self._keys)), "openai", make_error_response,
            open_paths=("/health", "/openapi.json"),
        )  # fmt: skip
        rest = behind_guard(
            make_rest_app(config, triton), "rest", make_rest_error,
            open_paths=HEALTH_PATHS, takes_binary=True, encodings=(b"gzip", b"deflate"),
        )  # fmt: skip
        metrics = behind_guard(
            make_metrics_app(config.triton.metrics_socket, self._counts), "metrics", make_rest_error,
            open_paths=("/metrics",) if front.is_local else (),
        )  # fmt: skip
        self._http: dict[str, HttpServer] = {
            "openai": make_http_server(openai, config, front.openai_port, error_body=make_error_body),
            "rest": make_http_server(rest, config, front.rest_port),
            "metrics": make_http_server(metrics, config, front.metrics_port),
        }

    async def run(self, lines: asyncio.StreamReader, sockets: Mapping[str, Sequence[int]]) -> None:
        """Serve until SIGTERM, or the end of `lines`; then until open requests have been answered.

        Args:
            lines: changes, each a JSON object.
            sockets: descriptors of the listening sockets by port; a port without any opens its own.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        await self._grpc.start(_open_descriptors(sockets.get("grpc")))
        running = [
            asyncio.create_task(server.serve(_open_descriptors(sockets.get(name))), name=name)
            for name, server in self._http.items()
        ]
        listener = asyncio.create_task(self._listen(lines))
        try:
            await self._open(running)
            waiting = asyncio.create_task(self._stopping.wait())
            # If a port ends by itself the front ends, and is restarted.
            await asyncio.wait([waiting, *running], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        finally:
            await self._close(running)
            listener.cancel()

    async def _open(self, running: list[asyncio.Task[None]]) -> None:
        while not all(server.started for server in self._http.values()):
            if any(task.done() for task in running):
                return
            await asyncio.sleep(0.01)
        front_mark(Path(self._config.triton.run), os.getpid()).touch()

    async def _close(self, running: list[asyncio.Task[None]]) -> None:
        """Answer the open requests. Connections and streams without a request are not waited for."""
        self._admission.close()
        for server in self._http.values():
            server.should_exit = True
        stopping = asyncio.create_task(self._grpc.stop(self._config.drain_seconds))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.drain_seconds
        while self._admission.num_open and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        await asyncio.sleep(_POLL_SECONDS)  # for the last bytes
        results = await asyncio.gather(self._grpc.stop(0), stopping, *running, return_exceptions=True)
        await self._triton.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _listen(self, lines: asyncio.StreamReader) -> None:
        while line := await lines.readline():
            change: dict[str, Any] = json.loads(line)
            if "keys" in change:
                self._keys.replace(change["keys"])
            if "restarts" in change:
                self._counts.restarts = change["restarts"]
        self._stopping.set()


def _open_descriptors(descriptors: Any) -> list[socket.socket] | None:
    return [socket.socket(fileno=number) for number in descriptors] if descriptors else None


async def _main() -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    first = json.loads(await lines.readline())
    front = Front(ServeConfig.from_dict(first["config"]), first["keys"], first["restarts"])
    await front.run(lines, first["sockets"])


def main() -> None:
    """Serve. Signals other than SIGTERM are for the first process."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_main())


if __name__ == "__main__":
    main()
