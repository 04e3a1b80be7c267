"""ASGI middleware in front of every HTTP application: what it refuses does not reach the application.

It checks, in this order: the form of the head, the host that the request is addressed to, the page that sent it, the
key, a free slot, the type of the body, and the body itself. The application gets the body in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oarlock.serve.front.admission import Admission, AdmissionRefused, identify_client
from oarlock.serve.front.http.bodies import CLOSE, Body, ClientDisconnected, check_length, has_body
from oarlock.serve.front.http.heads import HeadRules
from oarlock.serve.front.http.refusal import HttpRefusal
from oarlock.serve.front.keys import Keys

ErrorResponse = Callable[[int, str, Mapping[str, str]], Response]
_METHODS = ("GET", "HEAD", "POST", "OPTIONS")
_NEEDS_KEY = "the API key is missing or wrong (Authorization: Bearer KEY)"
# Headers of an answer that scripts of allowed pages may read.
_EXPOSED = ("Inference-Header-Content-Length", "Retry-After")


@dataclass(frozen=True)
class GuardRules:
    """The rules of a port.

    Attributes:
        head: of its requests.
        max_body: bytes.
        body_seconds: from the first to the last byte of a body.
        open_paths: paths that need neither key nor slot, for probes.
    """

    head: HeadRules
    max_body: int
    body_seconds: float = 30.0
    open_paths: Collection[str] = ()


class Guard:
    """Middleware for one port."""

    def __init__(
        self, app: ASGIApp, rules: GuardRules, keys: Keys, admission: Admission, error_response: ErrorResponse
    ) -> None:
        """Guard `app`; `error_response` writes an error as the clients of the port read it."""
        self._app, self._rules, self._keys, self._admission = app, rules, keys, admission
        self._error_response = error_response
        self._enter: ASGIApp = self._admit
        if origins := rules.head.origins:
            self._enter = CORSMiddleware(
                self._admit, allow_origins=tuple(origins), allow_methods=("GET", "POST"), allow_headers=("*",),
                expose_headers=_EXPOSED, allow_private_network=True,
            )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on to the application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                scope["oarlock.headers"] = self._rules.head.read(scope)
                if scope["method"] not in _METHODS:
                    raise HttpRefusal(405, "there is no such method here", {"Allow": ", ".join(_METHODS)})
            except HttpRefusal as refusal:
                await self._refuse(refusal, scope, receive, send)
                return
            await self._enter(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._rules.open_paths:
            await self._read(scope, receive, send)
            return
        headers = scope["oarlock.headers"]
        authorization = headers.get(b"authorization") if self._keys else None
        if not self._keys.accept(authorization):
            refusal = HttpRefusal(401, _NEEDS_KEY, {"WWW-Authenticate": "Bearer"})
            await self._refuse(refusal, scope, receive, send)
            return
        peer = scope.get("client")
        client = identify_client(peer[0] if peer else "", authorization)
        try:
            self._admission.acquire(client)
        except AdmissionRefused as error:
            refusal = HttpRefusal(503 if error.is_closing else 429, str(error), {"Retry-After": str(error.retry_after)})
            await self._refuse(refusal, scope, receive, send)
            return
        try:
            await self._read(scope, receive, send)
        finally:
            self._admission.release(client)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["oarlock.headers"]
        if not has_body(headers):
            await self._app(scope, receive, send)
            return
        body = Body(receive)
        try:
            self._rules.head.check_body_kind(headers)
            check_length(headers, self._rules.max_body)
            content = await body.read(self._rules.max_body, self._rules.body_seconds)
        except HttpRefusal as refusal:
            await self._refuse(refusal, scope, receive, send, body)
        except ClientDisconnected:
            return
        else:
            first = [{"type": "http.request", "body": content, "more_body": False}]

            async def replay() -> Message:
                return first.pop() if first else await receive()

            await self._app(scope, replay, send)

    async def _refuse(
        self, refusal: HttpRefusal, scope: Scope, receive: Receive, send: Send, body: Body | None = None
    ) -> None:
        """Send a refusal. If a body was to come the connection is closed, since its end can't be waited for."""
        is_unread = any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in scope["headers"]
        )
        headers = {**refusal.headers, **(CLOSE if is_unread else {})}
        response = self._error_response(refusal.status, str(refusal), headers)
        if not is_unread:
            await response(scope, receive, send)
            return

        async def kept_open(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send({**message, "more_body": True} if is_last else message)

        await response(scope, receive, kept_open)
        if refusal.status != 408:
            await (body or Body(receive)).drain()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
