"""Which requests the guard of the HTTP ports lets through to an application, over a socket."""

from __future__ import annotations

import socket

import pytest

from front_ports import GUARD_S, OPTIONS, configure, exchange_bytes, make_head, read_status, read_to_end, serve_app
from oarlock.serve.front.admission import Admission, AdmissionRefused, identify_client
from oarlock.serve.front.http import protocol
from oarlock.serve.front.http.protocol import set_socket_options
from oarlock.serve.front.http.server import guard_app
from oarlock.serve.front.keys import Keys
from support.guarded_echo import BODY, ask, error


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LocalHost", "localhost:9", "127.0.0.1:65535"])
def test_host_names_of_the_server_are_accepted(port, host):
    assert ask(port, host=host) == (200, {"size": len(BODY)})


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "10.1.2.3", "", "localhost:",
     "localhost:8080:1", "[::2]", "localhost/", "a@localhost", "localhost ,evil", "xn--lcalhost-d6a", "0.0.0.0"],
)  # fmt: skip
def test_other_host_names_are_refused(echo, port, host):
    """As after DNS rebinding."""
    before = len(echo.asked)
    code, told = ask(port, host=host)
    assert code == 403 and "--allowed-host" in told["error"] and len(echo.asked) == before


def test_allowed_host_names_and_addresses_are_accepted(echo):
    config = configure(host="0.0.0.0", allowed_hosts=("Models.Example",))
    with serve_app(guard_app(echo, config, Keys(), Admission(8, 8), error), config) as port:
        for host, code in (("models.example:80", 200), (socket.gethostname(), 200), ("127.0.0.1", 200), ("10.9.8.7", 403), ("a.models.example", 403)):  # fmt: skip
            assert ask(port, host=host)[0] == code, host


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:3000"}, {"Origin": ""},
     {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}, {"Sec_Fetch_Site": "hm"}],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_cross_origin_requests_are_refused(echo, port, headers, method):
    before = len(echo.asked)
    answer = exchange_bytes(port, make_head(method=method, Access_Control_Request_Method="POST", **headers))
    assert read_status(answer) == 403 and b"access-control-allow-origin" not in answer.lower()
    assert len(echo.asked) == before


def test_an_allowed_origin_is_accepted(echo):
    page = "https://app.example"
    config = configure(cors_origins=(page,))
    with serve_app(guard_app(echo, config, Keys(["key"]), Admission(8, 8), error), config) as port:
        asked = {"Origin": page, "Sec_Fetch_Site": "cross-site"}
        preflight = exchange_bytes(port, make_head(method="OPTIONS", Access_Control_Request_Method="POST", Access_Control_Request_Headers="authorization, x-stainless-os", **asked))  # fmt: skip
        assert read_status(preflight) == 200 and f"access-control-allow-origin: {page}".encode() in preflight.lower()
        assert b"access-control-allow-headers: authorization, x-stainless-os" in preflight.lower()
        for key, code in (("key", 200), ("no", 401)):  # the page can read errors, too
            answer = exchange_bytes(port, make_head(Content_Type="application/json", Content_Length=2, Authorization=f"Bearer {key}", **asked) + b"{}")  # fmt: skip
            assert read_status(answer) == code and f"access-control-allow-origin: {page}".encode() in answer.lower()
        assert read_status(exchange_bytes(port, make_head(method="GET", Origin="https://other.example"))) == 403


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", "json",
     "application/jsonp", "text/plain; application/json", "application/octet-stream", "application/json/x"],
)  # fmt: skip
def test_other_content_types_are_refused(echo, port, kind):
    before = len(echo.asked)
    code, told = ask(port, Content_Type=kind)
    assert code == 415 and kind in told["error"] and len(echo.asked) == before


def test_json_bodies_are_accepted(port):
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/problem+json"):
        assert ask(port, Content_Type=kind)[0] == 200
    assert read_status(exchange_bytes(port, make_head(Content_Length=2) + b"{}")) == 200  # as tritonclient sends it
    assert ask(port, Content_Encoding="gzip")[0] == 415 and ask(port, Content_Encoding="identity")[0] == 200


def test_the_number_of_open_requests_is_limited(echo, port):
    """Four per client; a fifth is asked to retry, and succeeds when one has ended."""
    echo.go.clear()
    clients = []
    for _ in range(4):
        clients.append(socket.create_connection(("127.0.0.1", port), timeout=GUARD_S))
        clients[-1].sendall(make_head("/wait", "GET"))
        assert echo.waits.acquire(timeout=GUARD_S)
    answer = exchange_bytes(port, make_head())
    assert read_status(answer) == 429 and b"retry-after: 1" in answer.lower()
    assert read_status(exchange_bytes(port, make_head("/probe", "GET"))) == 200  # needs none
    echo.go.set()
    for client in clients:
        assert read_status(read_to_end(client)) == 200
        client.close()
    assert ask(port)[0] == 200


def test_a_key_is_required(echo):
    with serve_app(
        guard_app(echo, OPTIONS, Keys(["one", "two"]), Admission(8, 8), error, open_paths=("/probe",))
    ) as port:
        for given, code in ((None, 401), ("Bearer one", 200), ("bearer two", 200), ("Bearer three", 401), ("one", 401), ("Bearer ", 401), ("Bearer one\xff", 401)):  # fmt: skip
            answer = exchange_bytes(port, make_head(**({} if given is None else {"Authorization": given})))
            assert read_status(answer) == code, given
            assert code == 200 or b"www-authenticate: bearer" in answer.lower()
        assert read_status(exchange_bytes(port, make_head("/probe"))) == 200


def test_answers_are_sent_without_delay(echo, monkeypatch):
    """Even behind a listening socket that does not name its protocol, as in these tests."""
    seen = []

    def noted(connection):
        set_socket_options(connection)
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(protocol, "set_socket_options", noted)
    with serve_app(guard_app(echo, OPTIONS, Keys(), Admission(8, 8), error)) as port:
        assert read_status(exchange_bytes(port, make_head())) == 200
    assert seen == [1]


def test_clients_are_identified_by_address_or_key():
    assert identify_client("10.0.0.1") == "10.0.0.1" == identify_client("::ffff:10.0.0.1")
    assert (
        identify_client("2001:db8:1:2:3::4")
        == identify_client("2001:db8:1:2::9%eth0")
        != identify_client("2001:db8:1:3::9")
    )
    assert (
        identify_client("10.0.0.1", b"Bearer k")
        == identify_client("10.0.0.2", b"Bearer k")
        != identify_client("10.0.0.1", b"Bearer l")
    )
    assert "Bearer" not in identify_client("", b"Bearer k") and identify_client("nonsense:") == "nonsense:"


def test_admission_control():
    places = Admission(3, 2)
    places.acquire("a")
    places.acquire("a")
    with pytest.raises(AdmissionRefused, match="2 requests of this client are open"):
        places.acquire("a")
    places.acquire("b")
    with pytest.raises(AdmissionRefused, match="3 requests are open"):
        places.acquire("c")
    places.release("a")
    places.acquire("c")
    for client in "abc":
        places.release(client)
    assert places.num_open == 0 and not places._open  # nothing is kept about clients that are gone
    places.close()
    with pytest.raises(AdmissionRefused, match="shutting down") as refused:
        places.acquire("a")
    assert refused.value.is_closing
