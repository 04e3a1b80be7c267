"""The REST port of the front returns the same bytes as the HTTP port of the same Triton."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import zlib

import numpy as np
import pytest
import tritonclient.http as tritonclient
from starlette.types import Receive, Scope, Send

from direct_triton import MODELS, direct_triton
from front_ports import GUARD_S, serve_app
from oarlock.serve.config import ServeConfig, TritonConfig
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.http.server import guard_app
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.rest.routes import HEALTH_PATHS, make_rest_app, make_rest_error
from oarlock.serve.triton.client import TritonClient

GENERATE, STREAM, INFER = "/v2/models/oarlock/generate", "/v2/models/oarlock/generate_stream", "/v2/models/oarlock_infer/infer"  # fmt: skip


@pytest.fixture(scope="module")
def addresses(repository, tmp_path_factory):
    """HOST:PORT of Triton's own port and of the front."""
    with direct_triton(repository, tmp_path_factory.mktemp("direct") / "run") as triton:
        config = ServeConfig(triton=TritonConfig(models=MODELS, run=triton.run))
        apps = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if not apps:  # grpcio must be created in the event loop that uses it
                rest = make_rest_app(config, TritonClient(f"unix:{config.triton.grpc_socket}"))
                apps.append(guard_app(rest, config, Keys(), Admission(99, 99), make_rest_error, open_paths=HEALTH_PATHS,
                                    takes_binary=True, encodings=(b"gzip", b"deflate")))  # fmt: skip
            await apps[0](scope, receive, send)

        with serve_app(app, config) as port:
            yield triton.rest, f"127.0.0.1:{port}"


def ask(address, path, body=None, **headers):
    """Return (status, content type, number of JSON bytes before binary tensors, body)."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=GUARD_S)) as client:
        given = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        client.request("GET" if body is None else "POST", path, body, given)
        answer = client.getresponse()
        kind = answer.headers.get("Content-Type")
        return answer.status, kind, answer.headers.get("Inference-Header-Content-Length"), answer.read()


def question(**more):
    return {"text_input": "river", "max_tokens": 5, "temperature": 0, "ignore_eos": True, **more}


def tensors(**more):
    kinds = {"text_input": "BYTES", "max_tokens": "INT32", "temperature": "FP32", "ignore_eos": "BOOL"}
    return [{"name": name, "datatype": kinds[name], "shape": [1], "data": [value]} for name, value in question(**more).items()]  # fmt: skip


def test_model_metadata(addresses):
    for path in (*(f"/v2/models/{model}{what}" for model in MODELS for what in ("", "/versions/1", "/config")),
                 "/v2/models/nobody", "/v2/models/oarlock/versions/7", "/v2/models/nobody/config"):  # fmt: skip
        assert ask(addresses[0], path) == ask(addresses[1], path), path
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/oarlock/ready", "/v2/models/nobody/ready", "/v2/models/oarlock/versions/7/ready"):  # fmt: skip
        (status, *_, body), (own_status, *_, own) = (ask(address, path) for address in addresses)
        assert (status, body) == (own_status, own), path
    for path in ("/v2/models/stats", "/v2/models/oarlock_json/stats"):  # in another order
        of_triton, own = (json.loads(ask(address, path)[3]) for address in addresses)
        assert of_triton == own and own["model_stats"], path
    of_triton, own = (json.loads(ask(address, "/v2")[3]) for address in addresses)
    closed = {"model_repository", "model_repository(unload_dependents)", "system_shared_memory", "cuda_shared_memory", "trace", "logging"}  # fmt: skip
    assert set(of_triton["extensions"]) - closed == set(own.pop("extensions"))
    assert own == {"name": "triton", "version": of_triton["version"]}


@pytest.mark.parametrize("path", [GENERATE, STREAM])
def test_generate(addresses, path):
    for given in (question(), question(id="r-7"), {"parameters": question()}, question(chat=True), question(stop=["a", "zz"]),
                  question(text_input=["river"]), question(seed=5, temperature=1.5), question(text_input='é\u0001\u2028"/\\'), question(adapter="pirate"),
                  question(stop_token_ids=[])):  # fmt: skip
        body = json.dumps(given).encode()
        (status, *more), own = (ask(address, path, body) for address in addresses)
        assert own == (status, *more) and status == 200 and b'"completion_tokens":' in more[-1], given
    form = {"text": "river", "max_dec_len": 3, "min_dec_len": 3, "temperature": 0, "req_id": "7"}
    if path == STREAM:  # chunks may be joined differently
        parts = []
        for address in addresses:
            events = ask(
                address, "/v2/models/oarlock_json/generate_stream", json.dumps({"IN": json.dumps(form)}).encode()
            )
            outs = [json.loads(json.loads(line.removeprefix(b"data: "))["OUT"]) for line in events[3].split(b"\n\n") if line]  # fmt: skip
            parts.append((events[:2], [token for out in outs for token in out["token_ids"]], outs[-1]["is_end"]))
        assert parts[0] == parts[1] and len(parts[0][1]) == 3


def test_infer(addresses):
    asked = [
        {"inputs": tensors()},
        {"inputs": tensors(), "id": "9", "outputs": []},
        {"inputs": tensors(), "parameters": {"binary_data_output": True, "priority": 1, "timeout": 5_000_000}},
        {"inputs": tensors(), "outputs": [{"name": "token_ids"}, {"name": "text_output", "parameters": {"binary_data": True}}]},
        {"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [4], "data": [[5, 6], [7, 8]]}, *tensors()[1:]]},
    ]  # fmt: skip
    bodies = [(json.dumps(given).encode(), {}) for given in asked]
    made = [tritonclient.InferInput("text_input", [1], "BYTES"), tritonclient.InferInput("max_tokens", [1], "INT32")]
    for binary in (True, False):
        made[0].set_data_from_numpy(np.array([b"river"], object), binary_data=binary)
        made[1].set_data_from_numpy(np.array([4], np.int32))
        for outputs in (None, [tritonclient.InferRequestedOutput("text_output")], [tritonclient.InferRequestedOutput("token_ids", binary_data=False), tritonclient.InferRequestedOutput("text_output")]):  # fmt: skip
            body, length = tritonclient.InferenceServerClient.generate_request_body(made, outputs)
            more = {"Inference_Header_Content_Length": str(length)}
            bodies += [(body, more), (gzip.compress(body), more | {"Content_Encoding": "gzip"}), (zlib.compress(body), more | {"Content_Encoding": "deflate"})]  # fmt: skip
    for body, headers in bodies:
        (status, *more), own = (ask(address, INFER, body, **headers) for address in addresses)
        assert own == (status, *more) and status == 200, body


def test_wrong_requests(addresses):
    """Both refuse them, though not always with the same message; the front never answers a client's mistake with 500."""
    wrong = [
        *((GENERATE, given) for given in ({}, [], question(temperature=-1), question(text_input=5), question(text_input=["a", "b"]),
          question(max_tokens="4"), question(max_tokens=True), question(parameters=5), question(adapter="nobody"), question(messages="[]"))),
        *((STREAM, given) for given in ({}, question(temperature=-1), question(max_tokens=0))),
        *((INFER, given) for given in ({}, {"inputs": []}, {"inputs": 5}, {"inputs": tensors(temperature=-1)}, {"inputs": tensors(max_tokens="x")},
          {"inputs": [tensors()[0] | {"name": "nobody"}]}, {"inputs": [tensors()[0] | {"shape": [2]}]}, {"inputs": tensors(), "outputs": [{"name": "nobody"}]})),
        ("/v2/models/oarlock/infer", {"inputs": tensors()}),
        ("/v2/models/nobody/infer", {"inputs": tensors()}),
        ("/v2/models/oarlock_infer/versions/9/infer", {"inputs": tensors()}),
    ]  # fmt: skip
    for path, given in wrong:
        body = json.dumps(given).encode()
        (status, *_), (own, kind, _, text) = (ask(address, path, body) for address in addresses)
        assert status >= 400 and own == (400 if status == 500 else status), (path, given, status, text)
        assert kind == "application/json" and json.loads(text)["error"]
