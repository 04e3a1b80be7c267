"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse

_TYPES = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "too_many_requests"),
    503: ("server_error", "unavailable"),
}
_RETRY = {"Retry-After": "1"}


def make_error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    """Make an error, with Retry-After if it makes sense to try again."""
    # Names and texts in a message may be the client's: anything at all.
    message, param = _clean(message), None if param is None else _clean(param)
    default = ("invalid_request_error", "invalid_request") if status < 500 else ("server_error", "internal_error")
    kind, code = _TYPES.get(status, default)
    content = {"error": {"message": message, "type": kind, "code": code, "param": param}}
    return JSONResponse(content, status, headers={**(_RETRY if status in (429, 503) else {}), **(headers or {})})


def make_error_body(status: int, message: str) -> bytes:
    """Make the body of an error."""
    return bytes(make_error_response(status, message).body)


def _clean(text: str) -> str:
    return text[:1000].encode("utf-8", "backslashreplace").decode("utf-8")
