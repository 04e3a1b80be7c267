"""What a request over HTTP is refused with."""

from __future__ import annotations

from collections.abc import Mapping


class HttpRefusal(Exception):
    """A request that is not answered as it is asked.

    Attributes:
        status: of HTTP.
        headers: of the answer, beside those that every answer has.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


def shown(text: str, most: int = 80) -> str:
    """A word of a client's as it may stand in an answer."""
    text = text if len(text) <= most else text[:most] + "..."
    return repr(text.encode("utf-8", "backslashreplace").decode("utf-8"))
