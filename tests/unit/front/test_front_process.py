"""The front as a separate process without Triton: its updates, ports, keys, encryption and exit."""

from __future__ import annotations

import os
import signal
import ssl
import time
from pathlib import Path

import grpc
import httpx
import pytest
from test_server_keys import make_certificate
from tritonclient.grpc import service_pb2, service_pb2_grpc

from helpers import free_ports
from oarlock.serve.config import FrontConfig, ServeConfig, TritonConfig
from oarlock.serve.front.start import front_mark, start_front, tell_front
from oarlock.serve.supervision.listening import Listening

GUARD_S = 120  # only guards against hanging


def configure(run, drain_seconds, **front):
    openai, rest, grpc_port, metrics = free_ports(4)
    return ServeConfig(
        triton=TritonConfig(models=("oarlock", "oarlock_infer"), run=str(run)),
        front=FrontConfig(openai_port=openai, rest_port=rest, grpc_port=grpc_port, metrics_port=metrics, **front),
        drain_seconds=drain_seconds,
    )


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """(process, configuration, path of the certificate), all ports encrypted, with one key."""
    run = tmp_path_factory.mktemp("front")
    certificate, key = make_certificate(run)
    config = configure(run, drain_seconds=2, tls_certificate=str(certificate), tls_key=str(key))
    listening = Listening(config.front)
    process = start_front(config, ("first",), listening.descriptors, {"front": 3})
    wait_until(lambda: front_mark(run, process.pid).exists() or process.poll() is not None)
    assert process.poll() is None, process.stdout.read()
    yield process, config.front, certificate
    if process.poll() is None:
        process.kill()
    process.wait()
    listening.close()


def wait_until(is_so):
    deadline = time.monotonic() + GUARD_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def get(front, port, path, key="first"):
    _, config, certificate = front
    context = ssl.create_default_context(cafile=certificate)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"https://localhost:{vars(config)[port + '_port']}{path}", headers=headers, verify=context)


def infer(front, key):
    _, config, certificate = front
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    request = service_pb2.ModelInferRequest(model_name="oarlock_infer")
    with grpc.secure_channel(f"localhost:{config.grpc_port}", credentials) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(request, metadata=(("authorization", f"Bearer {key}"),), timeout=GUARD_S)
    return refused.value.code()


def test_all_ports_are_encrypted_and_require_the_key(front):
    for port, path in (("openai", "/v1/models"), ("rest", "/v2")):
        assert get(front, port, path, "").status_code == get(front, port, path, "other").status_code == 401
        away = get(front, port, path)
        assert away.status_code == 503 and int(away.headers["Retry-After"]) > 0, (port, away.text)
    assert infer(front, "other") == grpc.StatusCode.UNAUTHENTICATED
    assert infer(front, "first") == grpc.StatusCode.UNAVAILABLE
    assert get(front, "rest", "/v2/health/ready", "").status_code == 503
    assert 'oarlock_restarts_total{part="front"} 3' in get(front, "metrics", "/metrics", "").text
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://localhost:{front[1].openai_port}/v1/models")


def test_arguments_and_environment_contain_no_secret(front):
    process = front[0]
    for name in ("cmdline", "environ"):
        assert b"first" not in Path(f"/proc/{process.pid}/{name}").read_bytes()


def test_the_front_accepts_updates_while_it_runs(front):
    process = front[0]
    tell_front(process, {"keys": ["second"], "restarts": {"triton": 7}})
    wait_until(lambda: get(front, "openai", "/v1/models", "second").status_code == 503)
    assert get(front, "rest", "/v2", "first").status_code == 401
    assert infer(front, "first") == grpc.StatusCode.UNAUTHENTICATED
    assert 'oarlock_restarts_total{part="triton"} 7' in get(front, "metrics", "/metrics", "").text
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    assert get(front, "openai", "/v1/models", "second").status_code == 503 and process.poll() is None


def test_the_front_stops_on_request(front):
    """It does not wait for idle connections and streams."""
    process, config, certificate = front
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    with grpc.secure_channel(f"localhost:{config.grpc_port}", credentials) as channel:
        grpc.channel_ready_future(channel).result(GUARD_S)
        process.terminate()
        assert process.wait(GUARD_S) == 0, process.stdout.read()
    assert process.stdout.read() == ""


def test_the_front_stops_with_the_first_process(tmp_path):
    config = configure(tmp_path, drain_seconds=1)
    listening = Listening(config.front)
    process = start_front(config, (), listening.descriptors)
    wait_until(lambda: front_mark(tmp_path, process.pid).exists() or process.poll() is not None)
    process.stdin.close()
    assert process.wait(GUARD_S) == 0, process.stdout.read()
    assert os.path.exists(front_mark(tmp_path, process.pid))
    listening.close()
