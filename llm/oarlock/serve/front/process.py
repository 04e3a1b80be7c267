"""The front: `python -m oarlock.serve.front.process`, started by the first process, which speaks to it on its stdin.

The first line is its FrontOptions. Further ones change what may change while it runs: {"keys": [...]} and
{"restarts": {...}}. One event loop serves all four ports. SIGTERM has it answer what is open, `drain_seconds` at most;
the end of stdin means that the first process has ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from oarlock.serve.front.admission import Admission
from oarlock.serve.front.grpc.server import make_grpc_server
from oarlock.serve.front.http.guard import ErrorResponse
from oarlock.serve.front.http.server import HttpServer, guarded, make_http_server
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.metrics import FrontCounts, make_metrics_app
from oarlock.serve.front.options import FrontOptions, FrontState
from oarlock.serve.front.rest.routes import HEALTH_PATHS, make_rest_app, rest_error
from oarlock.serve.front.start import front_mark
from oarlock.serve.front.upstream import Upstream
from oarlock.serve.openai.app import make_openai_app
from oarlock.serve.openai.errors import error_body, error_response

_LINE_BYTES = 4 << 20  # keys may be many
_LOOK_SECONDS = 0.05


class Front:
    """All that runs in the loop."""

    def __init__(self, options: FrontOptions) -> None:
        """Made inside of the loop."""
        self._options = options
        self._keys = Keys(options.keys)
        self._state = FrontState(restarts=dict(options.restarts))
        self._upstream = Upstream(options.triton_grpc)
        self._admission = Admission(options.max_open, options.max_open_per_client)
        self._stopping = asyncio.Event()
        counts = FrontCounts()
        self._grpc = make_grpc_server(options, self._upstream, self._keys, self._admission, counts)
        self._http = self._make_http(counts)

    def _make_http(self, counts: FrontCounts) -> dict[str, HttpServer]:
        options, ports, upstream = self._options, self._options.ports, self._upstream

        def behind_guard(app: Any, door: str, write_error: ErrorResponse, **more: Any) -> Any:
            return counts.counted(guarded(app, options, self._keys, self._admission, write_error, **more), door)

        openai = behind_guard(
            make_openai_app(options, upstream), "openai", error_response, open_paths=("/health", "/openapi.json")
        )
        rest = behind_guard(
            make_rest_app(options, upstream), "rest", rest_error,
            open_paths=HEALTH_PATHS, takes_binary=True, encodings=(b"gzip", b"deflate"),
        )  # fmt: skip
        metrics = behind_guard(
            make_metrics_app(options, upstream, counts, self._state), "metrics", rest_error,
            open_paths=("/metrics",) if options.is_local else (),
        )  # fmt: skip
        return {
            "openai": make_http_server(openai, options, ports.openai, error_body=error_body),
            "rest": make_http_server(rest, options, ports.rest),
            "metrics": make_http_server(metrics, options, ports.metrics),
        }

    async def run(self, lines: asyncio.StreamReader) -> None:
        """Until SIGTERM, or the end of `lines`; then until what is open has been answered."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        await self._grpc.start()
        running = [
            asyncio.create_task(server.serve(_sockets(self._options.sockets.get(name))), name=name)
            for name, server in self._http.items()
        ]
        listener = asyncio.create_task(self._listen(lines))
        try:
            await self._open(running)
            waiting = asyncio.create_task(self._stopping.wait())
            # A port that ends by itself ends the front, which is started again whole.
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
        if self._options.run:
            front_mark(Path(self._options.run), os.getpid()).touch()

    async def _close(self, running: list[asyncio.Task[None]]) -> None:
        """Answer what is open; a connection or a stream without a request is not waited for."""
        self._state.draining = True
        self._admission.close()
        for server in self._http.values():
            server.should_exit = True
        stopping = asyncio.create_task(self._grpc.stop(self._options.drain_seconds))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.drain_seconds
        while self._admission.num_open and loop.time() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
        await asyncio.sleep(_LOOK_SECONDS)  # for the last bytes
        results = await asyncio.gather(self._grpc.stop(0), stopping, *running, return_exceptions=True)
        await self._upstream.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _listen(self, lines: asyncio.StreamReader) -> None:
        while line := await lines.readline():
            told: dict[str, Any] = json.loads(line)
            if "keys" in told:
                self._keys.replace(told["keys"])
            if "restarts" in told:
                self._state.restarts = told["restarts"]
        self._stopping.set()


def _sockets(descriptors: Any) -> list[socket.socket] | None:
    return [socket.socket(fileno=number) for number in descriptors] if descriptors else None


async def _main() -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    options = FrontOptions.from_json((await lines.readline()).decode())
    await Front(options).run(lines)


def main() -> None:
    """Serve; signals other than SIGTERM are for the first process."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_main())


if __name__ == "__main__":
    main()
