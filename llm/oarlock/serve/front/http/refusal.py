"""The exception that refuses a request over HTTP, and how messages quote a client's values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class HttpRefusal(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        headers: of the answer, besides those that every answer has.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


def quote(text: str, most: int = 80) -> str:
    """Quote a client's word for a message, cut if it is long."""
    text = text if len(text) <= most else text[:most] + "..."
    return repr(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def quote_json(value: Any, most: int = 80) -> str:
    """Quote a client's value for a message, cut if it is long."""
    text = json.dumps(value)  # in ASCII; its depth was limited when it was read
    return text if len(text) <= most else text[:most] + "..."
