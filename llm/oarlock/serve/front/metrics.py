"""The metrics port: Triton's metrics, read through its Unix socket, and the front's (Prometheus text format 0.0.4)."""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_TEXT, _SECONDS = 8 << 20, 5.0  # of Triton's
_MODEL = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?(/(?:infer|generate|generate_stream|ready|config|stats))?")
_ROUTES = {
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/openapi.json", "/metrics"),
    *("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats"),
}


class FrontCounts:
    """Requests since the front was started; to be used in one event loop.

    Attributes:
        restarts: how often each part of the server (triton, front, guardian, model) has been restarted.
    """

    def __init__(self, restarts: Mapping[str, int] = MappingProxyType({})) -> None:
        self.restarts = restarts
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._refusals: Counter[tuple[str, str]] = Counter()

    def add_request(self, door: str, route: str, code: str) -> None:
        """Count a request that has ended.

        Args:
            door: "grpc", "rest", "openai" or "metrics".
            route: one of a few; never a client's text.
            code: of gRPC, or the HTTP status.
        """
        self._requests[door, route, code] += 1

    def add_refusal(self, door: str, reason: str) -> None:
        """Count a request that was not passed on."""
        self._refusals[door, reason] += 1

    def count_requests(self, app: App, door: str) -> App:
        """Wrap an ASGI application to count its requests, also those that a guard inside of it refuses."""

        async def count(scope: Message, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status = "none"  # if the client disconnects before the answer

            async def noted(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            try:
                await app(scope, receive, noted)
            finally:
                self.add_request(door, name_route(scope["path"]), status)

        return count

    def to_text(self, triton_is_up: bool) -> str:
        """The metrics in Prometheus' text format."""
        families: list[tuple[str, str, str, Iterable[tuple[str, int]]]] = [
            (
                "oarlock_front_requests_total",
                "counter",
                "Requests that have ended, by port, route and status code",
                (
                    (f'door="{door}",route="{route}",code="{code}"', count)
                    for (door, route, code), count in sorted(self._requests.items())
                ),
            ),
            (
                "oarlock_front_refused_total",
                "counter",
                "Requests over gRPC that were not passed on",
                (
                    (f'door="{door}",reason="{reason}"', count)
                    for (door, reason), count in sorted(self._refusals.items())
                ),
            ),
            (
                "oarlock_restarts_total",
                "counter",
                "How often a part of the server was restarted",
                ((f'part="{part}"', count) for part, count in sorted(self.restarts.items())),
            ),
            ("oarlock_triton_up", "gauge", "Whether Triton gives its metrics", (("", int(triton_is_up)),)),
        ]
        lines = []
        for name, kind, words, values in families:
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{{{labels}}} {value}" if labels else f"{name} {value}" for labels, value in values]
        return "\n".join(lines) + "\n"


def name_route(path: str) -> str:
    """Name the route of an HTTP request's path. Names that clients choose are left out."""
    if path in _ROUTES:
        return path
    if found := _MODEL.fullmatch(path):
        return "/v2/models/NAME" + (found[2] or "")
    return "/v1/models/NAME" if path.startswith("/v1/models/") else "other"


def make_metrics_app(triton_socket: Path, counts: FrontCounts) -> App:
    """Make the application for GET /metrics. Triton's metrics are missing while it is away."""
    reading = asyncio.Semaphore(2)

    async def answer(scope: Message, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        response: Response
        if request.url.path != "/metrics":
            response = PlainTextResponse("only /metrics is served here\n", 404)
        elif request.method not in ("GET", "HEAD"):
            response = PlainTextResponse("/metrics takes GET\n", 405, headers={"Allow": "GET, HEAD"})
        else:
            async with reading:
                triton = await asyncio.to_thread(read_triton_metrics, triton_socket)
            own = counts.to_text(triton_is_up=bool(triton))
            response = PlainTextResponse(triton + own.encode(), media_type=_TYPE)
        await response(scope, receive, send)

    return answer


def read_triton_metrics(path: Path) -> bytes:
    """Read Triton's metrics as text; empty if they can't be read."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read(_MAX_TEXT)
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()
    return text if answer.status == 200 and len(text) < _MAX_TEXT else b""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
