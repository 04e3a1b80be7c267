"""The HTTP ports with arbitrary bytes: uvicorn's parser, the guard and the applications, without a socket.

Triton is scripted. Every response is valid HTTP, errors have messages, nothing returns 500, no request reaches Triton that
the check would refuse, and no slot, connection or task leaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h11
from harness import Harness

from front_ports import configure
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.check_request import check_infer_request
from oarlock.serve.front.http.server import HttpServer, guard_app, make_http_server
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.model_forms import ModelForms
from oarlock.serve.front.openai.app import make_openai_app
from oarlock.serve.front.openai.errors import make_error_body, make_error_response
from oarlock.serve.front.rest.routes import HEALTH_PATHS, make_rest_app, make_rest_error
from oarlock.serve.triton.fields import DEFAULT_TOKENS, RELAYED
from scripted_upstream import ScriptedUpstream, answer

MAX_BODY = 20_000
# 501: an invalid Transfer-Encoding, or /infer of a streaming model.
DECENT = {200, 204, 400, 401, 403, 404, 405, 408, 413, 414, 415, 429, 431, 501, 503, 505}
INPUTS = [
    {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hi"]},
    {"name": "input_ids", "datatype": "INT32", "shape": [2], "data": [[1], [2]]},
    {"name": "temperature", "datatype": "FP32", "shape": [1], "data": [0.5]},
]


class Fake(asyncio.Transport):
    """A connection whose other end is this process."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80)})
        self.heard, self.closing = bytearray(), False

    def write(self, data: Any) -> None:
        if not self.closing:
            self.heard += data

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


class Ports:
    """Both HTTP ports with a Triton that always gives the same answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.config = configure(max_body=MAX_BODY, cors_origins=("http://page.example",))
        self.upstream = ScriptedUpstream()
        self.upstream.script = [answer("h", [5], ""), answer("o", [6], "length")]
        self.upstream.to_one = answer()
        self.forms = ModelForms(self.upstream, self.config.triton.models, MAX_BODY)
        self.admission = Admission(100, 100)
        rest = guard_app(
            make_rest_app(self.config, self.upstream), self.config, Keys(), self.admission, make_rest_error,
            open_paths=HEALTH_PATHS, takes_binary=True, encodings=(b"gzip", b"deflate"),
        )  # fmt: skip
        openai = guard_app(
            make_openai_app(self.config, self.upstream), self.config, Keys(["key"]), self.admission, make_error_response,
            open_paths=("/health",),
        )  # fmt: skip
        self.servers = [
            make_http_server(rest, self.config, 0),
            make_http_server(openai, self.config, 0, error_body=make_error_body),
        ]
        for server in self.servers:
            server.config.load()
        self.complaints: list[str] = []

    async def say(self, server: HttpServer, data: bytes) -> bytes:
        """Everything a port answers to these bytes followed by the end of the connection."""
        transport = Fake()
        protocol = server.config.http_protocol_class(server.config, server.server_state, {})
        protocol.connection_made(transport)
        for begin in range(0, len(data), 4096):
            if not transport.closing:
                protocol.data_received(data[begin : begin + 4096])
                await asyncio.sleep(0)
        for _ in range(400):  # as long as the request is being handled
            await asyncio.sleep(0)
            if transport.closing or not server.server_state.tasks:
                break
        protocol.connection_lost(None)
        left = set(server.server_state.tasks)
        if left:
            _, pending = await asyncio.wait(left, timeout=30)
            assert not pending, "a request continues without its client"
        assert not self.admission.num_open and not protocol._limits.connections.num_open
        return bytes(transport.heard)


def check_answers(heard: bytes, data: bytes) -> None:
    """Read the answers one after another, as a client does."""
    while heard:
        client = h11.Connection(h11.CLIENT)
        method = "HEAD" if data.startswith(b"HEAD") else "GET"
        client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(heard)
        body, found = bytearray(), None
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return  # cancelled with its client
            if isinstance(event, h11.Response):
                found = event
            elif isinstance(event, h11.Data):
                body += event.data
        assert found is not None and found.status_code in DECENT, (found, bytes(body))
        kind = dict(found.headers).get(b"content-type", b"")
        if found.status_code >= 400 and body:
            told = json.loads(body.removeprefix(b"data: ") if b"event-stream" in kind else body)["error"]
            assert told if isinstance(told, str) else told["message"]
        heard = client.trailing_data[0] if method == "GET" else b""


def target(data: bytes, folder: Path, ports: Ports) -> None:
    async def run() -> None:
        limits = await ports.forms.get_limits()
        for server in ports.servers:
            ports.upstream.asked.clear()
            check_answers(await ports.say(server, data), data)
            for request in ports.upstream.asked:
                if hasattr(request, "inputs"):
                    for name in (RELAYED, DEFAULT_TOKENS):  # the front's own
                        request.parameters.pop(name, None)
                    check_infer_request(request, limits)
        assert not ports.complaints, ports.complaints

    ports.loop.run_until_complete(run())
    ports.complaints.clear()


@contextlib.contextmanager
def around() -> Iterator[Ports]:
    ports = Ports(asyncio.new_event_loop())

    class Complaints(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ports.complaints.append(self.format(record)[-2000:])

    handler = Complaints(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield ports
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        ports.loop.close()


def request(path: str, content: Any = None, *more: str, method: str = "POST", raw: bytes | None = None) -> bytes:
    body = raw if raw is not None else b"" if content is None else json.dumps(content).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost:8000", "Authorization: Bearer key", *more]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def seeds() -> list[bytes]:
    prompt = {"text_input": "hi", "max_tokens": 4, "temperature": 0.5, "stop": ["a"], "seed": 7, "chat": True}
    head = json.dumps({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": 4}}]})  # fmt: skip
    binary = head.encode() + b"\x05\0\0\0"
    infer = {"id": "7", "inputs": INPUTS[1:], "outputs": [{"name": "token_ids", "parameters": {"binary_data": True}}]}
    chat = {"model": "oarlock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
    chunked = request(
        "/v2/models/oarlock/generate", None, "Transfer-Encoding: chunked", "Content-Type: application/json"
    )
    return [
        request("/v2/models/oarlock_infer/generate", prompt),
        request("/v2/models/oarlock/generate_stream", {"id": "9", "parameters": prompt}),
        request("/v2/models/oarlock_json/generate_stream", {"IN": json.dumps({"text": "hi", "max_dec_len": 3})}),
        request("/v2/models/oarlock_infer/infer", infer),
        request("/v2/models/oarlock_infer/versions/1/infer", {"inputs": [INPUTS[0], INPUTS[2]], "parameters": {"binary_data_output": True, "priority": 1}}),
        request("/v2/models/oarlock_infer/infer", None, f"Inference-Header-Content-Length: {len(head)}", raw=binary),
        request("/v2/models/oarlock_infer/infer", None, "Content-Encoding: gzip", raw=gzip.compress(json.dumps(infer).encode())),
        *(request(path, method="GET") for path in ("/v2", "/v2/health/ready", "/v2/models/oarlock/config", "/v2/models/stats", "/v1/models")),
        request("/v2/models/oarlock/ready", method="GET") * 2,
        request("/v1/chat/completions", chat),
        request("/v1/completions", {"model": "oarlock", "prompt": ["a", [5]], "n": 2, "stop": ["x"], "logit_bias": {}, "user": "u"}),
        request("/v1/chat/completions", None, "Origin: http://page.example", "Access-Control-Request-Method: POST", method="OPTIONS"),
        chunked + b'8\r\n{"text_i\r\n9\r\nnput": "x\r\n2\r\n"}\r\n0\r\n\r\n',
        request("/v2/models/oarlock/generate", None, "Expect: 100-continue", "Origin: http://evil.example", raw=b"{}"),
    ]  # fmt: skip


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        b"\r\n", b"\r\n\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Host: evil\r\n", b"%00", b"%0d%0a",
        b"/versions/1", b"4611686018427387904", b"[2147483648, 2147483648]", b"NaN", b"1e999", b"1e-38", b"\\ud800", b"[" * 70,
        b"shared_memory_region", b"classification", b"oarlock_cancel", b"triton_final_response", b"oarlock_infer", b"HTTP/1.0",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Content-Encoding: deflate\r\n", b"-1", b"true", b"null", b"1\r\nx\r\n" * 300,
    ],
    around=around,
)  # fmt: skip
