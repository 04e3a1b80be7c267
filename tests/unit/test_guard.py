"""What the guard of the HTTP ports lets through: over a socket, with an application that says what it was asked."""

from __future__ import annotations

import dataclasses
import http.client
import json
import resource
import socket
import threading

import pytest
from starlette.responses import JSONResponse

from front_ports import GUARD_S, OPTIONS, content, head, heard, running, speak, status
from oarlock.serve.front import http_protocol
from oarlock.serve.front.admission import Admission, Refused, client_of
from oarlock.serve.front.http_protocol import set_socket_options
from oarlock.serve.front.http_server import guarded
from oarlock.serve.front.keys import Keys

BODY = b'{"a": 1}'


class Echo:
    """Says what it was asked; a request to /wait is answered when `go` is set."""

    def __init__(self):
        self.asked, self.go, self.waits = [], threading.Event(), threading.Semaphore(0)

    async def __call__(self, scope, receive, send):
        message = await receive()
        assert not message.get("more_body", False)  # it comes in one piece
        self.asked.append(scope["path"])
        if scope["path"] == "/wait":
            import asyncio

            self.waits.release()
            await asyncio.to_thread(self.go.wait, GUARD_S)
        await JSONResponse({"size": len(message.get("body", b""))})(scope, receive, send)


def error(status, message, headers):
    return JSONResponse({"error": message}, status, headers=dict(headers))


@pytest.fixture(scope="module")
def echo():
    return Echo()


@pytest.fixture(scope="module")
def port(echo):
    options = dataclasses.replace(OPTIONS, max_body=10_000, body_seconds=GUARD_S)
    with running(guarded(echo, options, Keys(), Admission(8, 4), error, open_paths=("/probe",)), options) as port:
        yield port


def ask(port, path="/x", body=BODY, **headers):
    answer = speak(
        port, head(path, **{"Content_Type": "application/json", "Content_Length": len(body), **headers}) + body
    )
    return status(answer), content(answer)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LocalHost", "localhost:9", "127.0.0.1:65535"])
def test_names_of_the_server(port, host):
    assert ask(port, host=host) == (200, {"size": len(BODY)})


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "10.1.2.3", "", "localhost:",
     "localhost:8080:1", "[::2]", "localhost/", "a@localhost", "localhost ,evil", "xn--lcalhost-d6a", "0.0.0.0"],
)  # fmt: skip
def test_other_names(echo, port, host):
    """As after DNS rebinding."""
    before = len(echo.asked)
    code, told = ask(port, host=host)
    assert code == 403 and "--allowed-host" in told["error"] and len(echo.asked) == before


def test_names_that_are_allowed_and_addresses_of_an_open_port(echo):
    options = dataclasses.replace(OPTIONS, host="0.0.0.0", allowed_hosts=("Models.Example",))
    with running(guarded(echo, options, Keys(), Admission(8, 8), error), options) as port:
        for host, code in (("models.example:80", 200), (socket.gethostname(), 200), ("127.0.0.1", 200), ("10.9.8.7", 403), ("a.models.example", 403)):  # fmt: skip
            assert ask(port, host=host)[0] == code, host


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:3000"}, {"Origin": ""},
     {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}, {"Sec_Fetch_Site": "hm"}],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_others(echo, port, headers, method):
    before = len(echo.asked)
    answer = speak(port, head(method=method, Access_Control_Request_Method="POST", **headers))
    assert status(answer) == 403 and b"access-control-allow-origin" not in answer.lower()
    assert len(echo.asked) == before


def test_a_page_that_is_allowed(echo):
    page = "https://app.example"
    options = dataclasses.replace(OPTIONS, cors_origins=(page,))
    with running(guarded(echo, options, Keys(["key"]), Admission(8, 8), error), options) as port:
        asked = {"Origin": page, "Sec_Fetch_Site": "cross-site"}
        preflight = speak(port, head(method="OPTIONS", Access_Control_Request_Method="POST", Access_Control_Request_Headers="authorization, x-stainless-os", **asked))  # fmt: skip
        assert status(preflight) == 200 and f"access-control-allow-origin: {page}".encode() in preflight.lower()
        assert b"access-control-allow-headers: authorization, x-stainless-os" in preflight.lower()
        for key, code in (("key", 200), ("no", 401)):  # an error can be read by the page, too
            answer = speak(port, head(Content_Type="application/json", Content_Length=2, Authorization=f"Bearer {key}", **asked) + b"{}")  # fmt: skip
            assert status(answer) == code and f"access-control-allow-origin: {page}".encode() in answer.lower()
        assert status(speak(port, head(method="GET", Origin="https://other.example"))) == 403


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", "json",
     "application/jsonp", "text/plain; application/json", "application/octet-stream", "application/json/x"],
)  # fmt: skip
def test_bodies_of_other_kinds(echo, port, kind):
    before = len(echo.asked)
    code, told = ask(port, Content_Type=kind)
    assert code == 415 and kind in told["error"] and len(echo.asked) == before


def test_bodies_of_json(port):
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/problem+json"):
        assert ask(port, Content_Type=kind)[0] == 200
    assert status(speak(port, head(Content_Length=2) + b"{}")) == 200  # as tritonclient sends it
    assert ask(port, Content_Encoding="gzip")[0] == 415 and ask(port, Content_Encoding="identity")[0] == 200


def test_a_body_that_is_too_large(echo, port):
    before = len(echo.asked)
    assert ask(port, body=b"x" * 10_000)[0] == 200
    code, told = ask(port, body=b"x" * 10_001)
    assert code == 413 and "10,000 bytes" in told["error"]
    # What announces gigabytes is refused before a byte of it; what announces nothing, at the first byte too many.
    assert status(speak(port, head(Content_Type="application/json", Content_Length=1 << 40), end=True)) == 413
    chunks = (b"2000\r\n" + b"x" * 8192 + b"\r\n") * 2
    answer = speak(port, head(Content_Type="application/json", Transfer_Encoding="chunked"), chunks, b"0\r\n\r\n")
    assert status(answer) == 413 and len(echo.asked) == before + 1


def test_a_client_that_looks_after_it_has_sent_all_hears_why(port):
    """http.client does not look at the answer before."""
    client = http.client.HTTPConnection("localhost", port, timeout=GUARD_S)
    client.request("POST", "/x", b"x" * 5_000_000, {"Content-Type": "application/json"})
    assert client.getresponse().status == 413
    client.close()


@pytest.mark.parametrize("framing", [{"Transfer_Encoding": "chunked"}, {"Content_Length": 200 << 20}])
def test_gigabytes_take_no_memory(port, framing):
    """Whether the client says how much it sends or not."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer = speak(port, head(Content_Type="application/json", **framing), *[piece] * 3200)
    assert not answer or status(answer) == 413  # none where the client was cut off before it looked
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 << 10  # KB
    assert ask(port)[0] == 200


def test_many_small_chunks(echo, port):
    """A body of a few KB may not cost seconds."""
    before = len(echo.asked)
    answer = speak(
        port, head(Content_Type="application/json", Transfer_Encoding="chunked"), b"1\r\nx\r\n" * 5000, b"0\r\n\r\n"
    )
    assert status(answer) == 413 and "pieces" in content(answer)["error"] and len(echo.asked) == before
    some = speak(
        port, head(Content_Type="application/json", Transfer_Encoding="chunked"), b"1\r\nx\r\n" * 500, b"0\r\n\r\n"
    )
    assert status(some) == 200 and content(some) == {"size": 500}


def test_slow_bodies_are_cut(echo):
    options = dataclasses.replace(OPTIONS, body_seconds=0.05)
    with running(guarded(echo, options, Keys(), Admission(8, 8), error), options) as port:
        for framing in ({"Content_Length": 100}, {"Transfer_Encoding": "chunked"}):
            answer = speak(port, head(Content_Type="application/json", **framing), b"{")  # and nothing more
            assert status(answer) == 408 and "0.05 s" in content(answer)["error"]


def test_slow_heads_are_cut(echo):
    with running(guarded(echo, OPTIONS, Keys(), Admission(8, 8), error), head_seconds=0.05) as port:
        assert status(speak(port)) == 408  # nothing at all
        assert status(speak(port, b"POST / HTTP/1.1\r\nHost: loc")) == 408
        with socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) as client:  # in a second request, too
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET")
            answer = heard(client)
        assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in answer


def test_clients_that_take_nothing_are_let_go(echo):
    """An answer of many megabytes to a client that does not read."""

    async def flood(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(200):
            await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    places = Admission(1, 1)
    with (
        running(guarded(flood, OPTIONS, Keys(), places, error), write_seconds=0.05) as port,
        socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) as client,
    ):
        client.sendall(head())
        wait_until(lambda: places.num_open == 1)
        wait_until(lambda: places.num_open == 0)


def wait_until(is_so):
    import time

    deadline = time.monotonic() + GUARD_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_places(echo, port):
    """Four of a client; a further one is told to come back, and finds a place when one has gone."""
    echo.go.clear()
    clients = []
    for _ in range(4):
        clients.append(socket.create_connection(("127.0.0.1", port), timeout=GUARD_S))
        clients[-1].sendall(head("/wait", "GET"))
        assert echo.waits.acquire(timeout=GUARD_S)
    answer = speak(port, head())
    assert status(answer) == 429 and b"retry-after: 1" in answer.lower()
    assert status(speak(port, head("/probe", "GET"))) == 200  # needs none
    echo.go.set()
    for client in clients:
        assert status(heard(client)) == 200
        client.close()
    assert ask(port)[0] == 200


def test_connections_are_counted(echo):
    options = dataclasses.replace(OPTIONS, max_connections=4)  # so that a client may have 2
    with running(guarded(echo, options, Keys(), Admission(8, 8), error), options) as port:
        idle = [socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) for _ in range(2)]
        for client in idle:  # it is known to the server when it has answered
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(100)
        answer = speak(port)
        assert status(answer) == 429 and b"Retry-After: 1" in answer
        for client in idle:
            client.close()
        wait_until(lambda: status(speak(port, head())) == 200)


def test_keys(echo):
    with running(guarded(echo, OPTIONS, Keys(["one", "two"]), Admission(8, 8), error, open_paths=("/probe",))) as port:
        for given, code in ((None, 401), ("Bearer one", 200), ("bearer two", 200), ("Bearer three", 401), ("one", 401), ("Bearer ", 401), ("Bearer one\xff", 401)):  # fmt: skip
            answer = speak(port, head(**({} if given is None else {"Authorization": given})))
            assert status(answer) == code, given
            assert code == 200 or b"www-authenticate: bearer" in answer.lower()
        assert status(speak(port, head("/probe"))) == 200


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (head(Content_Length=2, Transfer_Encoding="chunked") + b"{}", 400),
        (head(Content_Length="2\r\nContent-Length: 3") + b"{}", 400),
        (head(Content_Length="+2") + b"{}", 400),
        (head(Content_Length="-1"), 400),
        (head(Content_Length="9" * 400), 400),
        (head(Transfer_Encoding="gzip"), 501),
        (head(Transfer_Encoding="chunked", version="1.0") + b"0\r\n\r\n", 400),
        (head(Transfer_Encoding="chunked\r\nTransfer-Encoding: chunked"), 501),
        (head(Host="localhost"), 400),
        (head(Content_Type="application/json\r\nContent-Type: text/plain", Content_Length=2) + b"{}", 400),
        (head(Authorization="a\r\nAuthorization: b"), 400),
        (head(**{f"A{i}": "x" for i in range(150)}), 431),
        (head(A="x" * 40_000), 431),
        (head(A="x" * 100_000), 431),
        (head("/" + "x" * 10_000), 414),
        (head("/x?" + "x" * 10_000), 414),
        (head("/a%00b"), 400),
        (head("/%ff"), 400),
        (head("/%0d%0aSet-Cookie:a"), 400),
        (head("http://evil.example/x"), 400),
        (head("*", method="OPTIONS"), 400),
        (head(method="TRACE"), 405),
        (head(method="PUT", Content_Length=2, Content_Type="application/json") + b"{}", 405),
        (head(method="CONNECT", path="evil.example:80"), 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 403),
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (head(version="2.0"), 505),
        (head("/x", Content_Length=2, Content_Type="application/json").replace(b"\r\nHost", b"\r\n Host") + b"{}", 400),
        (head(A="a\x00b"), 400),
        (head(**{"A b": "c"}), 400),
        (head(Transfer_Encoding="chunked", Content_Type="application/json") + b"zz\r\n", 400),
        (head(Transfer_Encoding="chunked", Content_Type="application/json") + b"ffffffffffffffffffffffff\r\n", 400),
        (head(Transfer_Encoding="chunked", Content_Type="application/json") + b"-1\r\n", 400),
    ],
)  # fmt: skip
def test_what_is_no_request(echo, port, request_bytes, code):
    before = len(echo.asked)
    answer = speak(port, request_bytes, end=True)
    assert status(answer) == code and content(answer)["error"] and len(echo.asked) == before
    assert ask(port)[0] == 200  # and the next request gets its answer


def test_a_client_that_goes_away_while_it_sends(echo, port):
    before = len(echo.asked)
    assert speak(port, head(Content_Type="application/json", Content_Length=100), b"{", end=True) == b""
    assert ask(port)[0] == 200 and len(echo.asked) == before + 1


def test_several_requests_of_a_connection(port):
    client = http.client.HTTPConnection("localhost", port, timeout=GUARD_S)
    for body in (BODY, b"{}"):
        client.request("POST", "/x", body, {"Content-Type": "application/json"})
        assert json.loads(client.getresponse().read()) == {"size": len(body)}
    client.close()


def test_answers_are_sent_at_once(echo, monkeypatch):
    """Also behind a listening socket that does not name its protocol, as that of these tests."""
    seen = []

    def noted(connection):
        set_socket_options(connection)
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(http_protocol, "set_socket_options", noted)
    with running(guarded(echo, OPTIONS, Keys(), Admission(8, 8), error)) as port:
        assert status(speak(port, head())) == 200
    assert seen == [1]


def test_whose_a_request_is():
    assert client_of("10.0.0.1") == "10.0.0.1" == client_of("::ffff:10.0.0.1")
    assert client_of("2001:db8:1:2:3::4") == client_of("2001:db8:1:2::9%eth0") != client_of("2001:db8:1:3::9")
    assert (
        client_of("10.0.0.1", b"Bearer k") == client_of("10.0.0.2", b"Bearer k") != client_of("10.0.0.1", b"Bearer l")
    )
    assert "Bearer" not in client_of("", b"Bearer k") and client_of("nonsense:") == "nonsense:"


def test_admission():
    places = Admission(3, 2)
    places.take("a")
    places.take("a")
    with pytest.raises(Refused, match="2 requests of this client are open"):
        places.take("a")
    places.take("b")
    with pytest.raises(Refused, match="3 requests are open"):
        places.take("c")
    places.leave("a")
    places.take("c")
    for client in "abc":
        places.leave(client)
    assert places.num_open == 0 and not places._open  # nothing is kept of clients that are gone
    places.close()
    with pytest.raises(Refused, match="about to end") as refused:
        places.take("a")
    assert refused.value.is_closing
