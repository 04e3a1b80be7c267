"""What stands before the OpenAI-compatible endpoint: API keys, the size of requests, how many are open (ASGI)."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_OPEN_PATHS = ("/health", "/openapi.json")  # for probes, and for who reads the description
_TYPES = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "too_many_requests"),
    503: ("server_error", "unavailable"),
}


def error_response(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    # Names and texts in a message may be the client's own: anything at all.
    message, param = _clean(message), None if param is None else _clean(param)
    default = ("invalid_request_error", "invalid_request") if status < 500 else ("server_error", "internal_error")
    kind, code = _TYPES.get(status, default)
    content = {"error": {"message": message, "type": kind, "code": code, "param": param}}
    return JSONResponse(content, status, headers=dict(headers or {}))


def _clean(text: str) -> str:
    return text[:1000].encode("utf-8", "backslashreplace").decode("utf-8")


class Guard:
    """Middleware; what it refuses never reaches the application."""

    def __init__(self, app: Any, keys: Sequence[str], max_body: int, max_open: int) -> None:
        """See ApiOptions."""
        self._app, self._max_body, self._max_open = app, max_body, max_open
        self._keys = [key.encode("utf-8") for key in keys]
        self._open = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer for the application, or let it."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(dict(scope["headers"]))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, self._counted(receive), send)
        finally:
            self._open -= 1

    def _refusal(self, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if self._keys and not self._knows(headers.get(b"authorization", b"")):
            return error_response(
                401,
                "the API key is missing or wrong (Authorization: Bearer KEY)",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body:
            return self._too_large()
        if self._open >= self._max_open:
            return error_response(429, f"{self._open} requests are open; try again later", headers={"Retry-After": "1"})
        return None

    def _knows(self, given: bytes) -> bool:
        """Compares with every key, each in constant time."""
        scheme, _, key = given.partition(b" ")
        found = False
        for known in self._keys:
            found |= hmac.compare_digest(key.strip(), known)
        return found and scheme.lower() == b"bearer"

    def _too_large(self) -> JSONResponse:
        return error_response(413, self._size_text(), headers={"Connection": "close"})

    def _size_text(self) -> str:
        return f"the request is larger than {self._max_body:,} bytes"

    def _counted(self, receive: Receive) -> Receive:
        """For bodies that come without a length."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, self._size_text(), headers={"Connection": "close"})  # the one FastAPI lets out
            return message

        return counted
