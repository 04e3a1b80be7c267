"""An application behind the guard that echoes requests, and a client of it."""

from __future__ import annotations

import asyncio
import threading
import time

from starlette.responses import JSONResponse

from front_ports import GUARD_S, exchange_bytes, make_head, read_content, read_status

BODY = b'{"a": 1}'


class Echo:
    """Echoes requests; a request to /wait is answered when `go` is set."""

    def __init__(self):
        self.asked, self.go, self.waits = [], threading.Event(), threading.Semaphore(0)

    async def __call__(self, scope, receive, send):
        message = await receive()
        assert not message.get("more_body", False)  # it arrives in one piece
        self.asked.append(scope["path"])
        if scope["path"] == "/wait":
            self.waits.release()
            await asyncio.to_thread(self.go.wait, GUARD_S)
        await JSONResponse({"size": len(message.get("body", b""))})(scope, receive, send)


def error(status, message, headers):
    """The error response of the guard's application."""
    return JSONResponse({"error": message}, status, headers=dict(headers))


def ask(port, path="/x", body=BODY, **headers):
    """Send a POST with a JSON body and return (status, content)."""
    answer = exchange_bytes(
        port, make_head(path, **{"Content_Type": "application/json", "Content_Length": len(body), **headers}) + body
    )
    return read_status(answer), read_content(answer)


def wait_until(is_so):
    """Wait until a condition holds, for at most GUARD_S seconds."""
    deadline = time.monotonic() + GUARD_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
