"""The port of the metrics: Triton's, read through its Unix socket, and the front's own (Prometheus' text)."""

from __future__ import annotations

from collections import Counter


class FrontCounts:
    """What the front has seen since it was started; everything here belongs to one event loop."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._refusals: Counter[tuple[str, str]] = Counter()

    def add_request(self, door: str, route: str, code: str) -> None:
        """One that has ended.

        Args:
            door: "grpc", "rest", "openai" or "metrics".
            route: one of few; never what a client wrote.
            code: of gRPC, or the status of HTTP.
        """
        self._requests[door, route, code] += 1

    def add_refusal(self, door: str, reason: str) -> None:
        """One that was not passed on."""
        self._refusals[door, reason] += 1


def make_metrics_app(options, upstream, counts, state):  # type: ignore[no-untyped-def]  # noqa
    import asyncio

    from starlette.responses import Response

    async def app(scope, receive, send):  # noqa
        try:
            r, w = await asyncio.open_unix_connection(options.triton_metrics)
            w.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = (await r.read()).partition(b"\r\n\r\n")[2]
            w.close()
        except OSError:
            text = b""
        await Response(text + str(state.restarts).encode(), media_type="text/plain")(scope, receive, send)

    return app
