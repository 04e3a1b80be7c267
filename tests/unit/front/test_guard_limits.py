"""Limits of the HTTP ports: sizes, chunks, times, connections, and malformed requests."""

from __future__ import annotations

import http.client
import json
import resource
import socket

import pytest

from front_ports import (
    GUARD_S,
    OPTIONS,
    configure,
    exchange_bytes,
    make_head,
    read_content,
    read_status,
    read_to_end,
    serve_app,
)
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.http.server import guard_app
from oarlock.serve.front.keys import Keys
from support.guarded_echo import BODY, ask, error, wait_until


def test_a_too_large_body_is_refused(echo, port):
    before = len(echo.asked)
    assert ask(port, body=b"x" * 10_000)[0] == 200
    code, told = ask(port, body=b"x" * 10_001)
    assert code == 413 and "10,000 bytes" in told["error"]
    # A declared length of gigabytes is refused before the first byte; without one, at the first byte above the limit.
    assert (
        read_status(exchange_bytes(port, make_head(Content_Type="application/json", Content_Length=1 << 40), end=True))
        == 413
    )
    chunks = (b"2000\r\n" + b"x" * 8192 + b"\r\n") * 2
    answer = exchange_bytes(
        port, make_head(Content_Type="application/json", Transfer_Encoding="chunked"), chunks, b"0\r\n\r\n"
    )
    assert read_status(answer) == 413 and len(echo.asked) == before + 1


def test_a_client_that_reads_after_sending_gets_the_error(port):
    """http.client does not read before it has sent everything."""
    client = http.client.HTTPConnection("localhost", port, timeout=GUARD_S)
    client.request("POST", "/x", b"x" * 5_000_000, {"Content-Type": "application/json"})
    assert client.getresponse().status == 413
    client.close()


@pytest.mark.parametrize("framing", [{"Transfer_Encoding": "chunked"}, {"Content_Length": 200 << 20}])
def test_gigabytes_take_no_memory(port, framing):
    """With and without a declared length."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer = exchange_bytes(port, make_head(Content_Type="application/json", **framing), *[piece] * 3200)
    assert not answer or read_status(answer) == 413  # none if the connection was closed before the client read
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 << 10  # KB
    assert ask(port)[0] == 200


def test_many_small_chunks_are_cheap(echo, port):
    """A body of a few KB must not cost seconds."""
    before = len(echo.asked)
    answer = exchange_bytes(
        port,
        make_head(Content_Type="application/json", Transfer_Encoding="chunked"),
        b"1\r\nx\r\n" * 5000,
        b"0\r\n\r\n",
    )
    assert read_status(answer) == 413 and "pieces" in read_content(answer)["error"] and len(echo.asked) == before
    some = exchange_bytes(
        port, make_head(Content_Type="application/json", Transfer_Encoding="chunked"), b"1\r\nx\r\n" * 500, b"0\r\n\r\n"
    )
    assert read_status(some) == 200 and read_content(some) == {"size": 500}


def test_slow_bodies_time_out(echo):
    config = configure(body_seconds=0.05)
    with serve_app(guard_app(echo, config, Keys(), Admission(8, 8), error), config) as port:
        for framing in ({"Content_Length": 100}, {"Transfer_Encoding": "chunked"}):
            answer = exchange_bytes(
                port, make_head(Content_Type="application/json", **framing), b"{"
            )  # and nothing more
            assert read_status(answer) == 408 and "0.05 s" in read_content(answer)["error"]


def test_slow_headers_time_out(echo):
    with serve_app(guard_app(echo, OPTIONS, Keys(), Admission(8, 8), error), head_seconds=0.05) as port:
        assert read_status(exchange_bytes(port)) == 408  # nothing at all
        assert read_status(exchange_bytes(port, b"POST / HTTP/1.1\r\nHost: loc")) == 408
        with socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) as client:  # in a second request, too
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET")
            answer = read_to_end(client)
        assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in answer


def test_clients_that_do_not_read_are_disconnected(echo):
    """An answer of many megabytes to a client that does not read."""

    async def flood(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(200):
            await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    places = Admission(1, 1)
    with (
        serve_app(guard_app(flood, OPTIONS, Keys(), places, error), write_seconds=0.05) as port,
        socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) as client,
    ):
        client.sendall(make_head())
        wait_until(lambda: places.num_open == 1)
        wait_until(lambda: places.num_open == 0)


def test_the_number_of_connections_is_limited(echo):
    config = configure(max_connections=4)  # so that a client may have 2
    with serve_app(guard_app(echo, config, Keys(), Admission(8, 8), error), config) as port:
        idle = [socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) for _ in range(2)]
        for client in idle:  # the server knows it once it has answered
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(100)
        answer = exchange_bytes(port)
        assert read_status(answer) == 429 and b"Retry-After: 1" in answer
        for client in idle:
            client.close()
        wait_until(lambda: read_status(exchange_bytes(port, make_head())) == 200)


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (make_head(Content_Length=2, Transfer_Encoding="chunked") + b"{}", 400),
        (make_head(Content_Length="2\r\nContent-Length: 3") + b"{}", 400),
        (make_head(Content_Length="+2") + b"{}", 400),
        (make_head(Content_Length="-1"), 400),
        (make_head(Content_Length="9" * 400), 400),
        (make_head(Transfer_Encoding="gzip"), 501),
        (make_head(Transfer_Encoding="chunked", version="1.0") + b"0\r\n\r\n", 400),
        (make_head(Transfer_Encoding="chunked\r\nTransfer-Encoding: chunked"), 501),
        (make_head(Host="localhost"), 400),
        (make_head(Content_Type="application/json\r\nContent-Type: text/plain", Content_Length=2) + b"{}", 400),
        (make_head(Authorization="a\r\nAuthorization: b"), 400),
        (make_head(**{f"A{i}": "x" for i in range(150)}), 431),
        (make_head(A="x" * 40_000), 431),
        (make_head(A="x" * 100_000), 431),
        (make_head("/" + "x" * 10_000), 414),
        (make_head("/x?" + "x" * 10_000), 414),
        (make_head("/a%00b"), 400),
        (make_head("/%ff"), 400),
        (make_head("/%0d%0aSet-Cookie:a"), 400),
        (make_head("http://evil.example/x"), 400),
        (make_head("*", method="OPTIONS"), 400),
        (make_head(method="TRACE"), 405),
        (make_head(method="PUT", Content_Length=2, Content_Type="application/json") + b"{}", 405),
        (make_head(method="CONNECT", path="evil.example:80"), 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 403),
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (make_head(version="2.0"), 505),
        (make_head("/x", Content_Length=2, Content_Type="application/json").replace(b"\r\nHost", b"\r\n Host") + b"{}", 400),
        (make_head(A="a\x00b"), 400),
        (make_head(**{"A b": "c"}), 400),
        (make_head(Transfer_Encoding="chunked", Content_Type="application/json") + b"zz\r\n", 400),
        (make_head(Transfer_Encoding="chunked", Content_Type="application/json") + b"ffffffffffffffffffffffff\r\n", 400),
        (make_head(Transfer_Encoding="chunked", Content_Type="application/json") + b"-1\r\n", 400),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused(echo, port, request_bytes, code):
    before = len(echo.asked)
    answer = exchange_bytes(port, request_bytes, end=True)
    assert read_status(answer) == code and read_content(answer)["error"] and len(echo.asked) == before
    assert ask(port)[0] == 200  # and the next request gets its answer


def test_a_client_that_disconnects_while_sending(echo, port):
    before = len(echo.asked)
    assert exchange_bytes(port, make_head(Content_Type="application/json", Content_Length=100), b"{", end=True) == b""
    assert ask(port)[0] == 200 and len(echo.asked) == before + 1


def test_several_requests_on_one_connection(port):
    client = http.client.HTTPConnection("localhost", port, timeout=GUARD_S)
    for body in (BODY, b"{}"):
        client.request("POST", "/x", body, {"Content-Type": "application/json"})
        assert json.loads(client.getresponse().read()) == {"size": len(body)}
    client.close()
