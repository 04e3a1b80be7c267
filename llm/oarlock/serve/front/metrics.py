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
