"""The metrics port returns Triton's text, fetched through its Unix socket, and that of the front, and nothing else."""

from __future__ import annotations

import socketserver
import threading
from http.server import BaseHTTPRequestHandler

import pytest
from starlette.testclient import TestClient

from oarlock.serve.front.metrics import FrontCounts, make_metrics_app, name_route

TRITON = b'# HELP nv_x y\nnv_x{model="oarlock"} 1\n'


class _Metrics(BaseHTTPRequestHandler):
    status, text = 200, TRITON

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.text)

    def log_message(self, *_):
        pass

    def address_string(self):
        return ""


@pytest.fixture
def triton(tmp_path):
    path = tmp_path / "metrics"
    with socketserver.ThreadingUnixStreamServer(str(path), _Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


def client_of(path, counts=None, restarts=None):
    counts = counts or FrontCounts()
    counts.restarts = restarts or {}
    return TestClient(make_metrics_app(path, counts))


def test_metrics_of_triton_and_the_front_are_served(triton, tmp_path):
    counts = FrontCounts()
    counts.add_request("grpc", "ModelInfer", "OK")
    counts.add_refusal("grpc", "size")
    answer = client_of(triton, counts, {"triton": 3}).get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.content.startswith(TRITON) and "oarlock_triton_up 1\n" in answer.text
    assert 'oarlock_front_requests_total{door="grpc",route="ModelInfer",code="OK"} 1\n' in answer.text
    assert 'oarlock_front_refused_total{door="grpc",reason="size"} 1\n' in answer.text
    assert 'oarlock_restarts_total{part="triton"} 3\n' in answer.text
    away = client_of(tmp_path / "nowhere").get("/metrics")
    assert away.status_code == 200 and "oarlock_triton_up 0\n" in away.text and "nv_x" not in away.text


def test_no_other_path_is_served(triton):
    client = client_of(triton)
    assert client.get("/").status_code == client.get("/metrics/x").status_code == client.get("/v2").status_code == 404
    assert client.post("/metrics").status_code == 405
    assert client.head("/metrics").content == b""


def test_unknown_paths_add_no_metrics():
    """The number of metrics does not depend on the paths that clients request."""
    assert name_route("/v2/models/anything/infer") == "/v2/models/NAME/infer"
    assert name_route("/v2/models/x/versions/7/generate_stream") == "/v2/models/NAME/generate_stream"
    assert name_route("/v2/models/x") == "/v2/models/NAME" and name_route("/v1/models/x") == "/v1/models/NAME"
    assert name_route("/v1/chat/completions") == "/v1/chat/completions"
    for path in ("/../x", "/v2/models/a/b/c", '/"', "/v2/repository/index", ""):
        assert name_route(path) == "other"


def test_requests_over_http_are_counted():
    counts = FrontCounts()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    TestClient(counts.count_requests(app, "rest")).get("/v2/models/x/infer")
    assert 'door="rest",route="/v2/models/NAME/infer",code="418"} 1' in counts.to_text(triton_is_up=True)
