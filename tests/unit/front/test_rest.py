"""The REST port: the Triton request made from each HTTP request, and the response made from its answers."""

from __future__ import annotations

import asyncio
import json
import time

import grpc
import pytest

from front_ports import OPTIONS
from oarlock.serve.front.rest.routes import make_rest_app
from oarlock.serve.triton.client import TritonFailure
from scripted_upstream import GENERATE, INFER, ONE, STREAM, answer, read_inputs, response


def test_generate(ask_rest, upstream):
    got = ask_rest(GENERATE, {"text_input": "hi", "max_tokens": 4, "temperature": 0, "stop": ["a", "b"], "stop_token_ids": [], "seed": -(2**63), "chat": True})  # fmt: skip
    assert got.status_code == 200 and got.headers["content-type"] == "application/json"
    # As Triton writes it: no spaces, names in order, a list of one as its element.
    assert got.text == '{"completion_tokens":2,"finish_reason":"stop","model_name":"oarlock","model_version":"1","prompt_tokens":3,"text_output":"ho","token_ids":[5,6]}'  # fmt: skip
    (request,) = upstream.asked
    assert read_inputs(request) == {"text_input": ["hi"], "max_tokens": [4], "temperature": [0], "stop": ["a", "b"], "stop_token_ids": [], "seed": [-(2**63)], "chat": [True]}  # fmt: skip
    assert request.model_name == "oarlock" and request.parameters["oarlock_relayed"].string_param


def test_generate_accepts_parameters_and_an_id(ask_rest, upstream):
    upstream.script = [response(id="r-7", text_output="é\n\u2028", token_ids=[5])]
    got = ask_rest(GENERATE, {"text_input": "hi", "id": "r-7", "parameters": {"max_tokens": 4, "stop": "x"}})
    assert got.json() == {"id": "r-7", "model_name": "oarlock", "model_version": "1", "text_output": "é\n\u2028", "token_ids": 5}  # fmt: skip
    assert read_inputs(upstream.asked[0]) == {"text_input": ["hi"], "max_tokens": [4], "stop": ["x"]}
    assert upstream.asked[0].id == "r-7"


def test_generate_of_every_model(ask_rest, upstream):
    for name, given in (("oarlock_infer", {"text_input": "hi"}), ("oarlock_json", {"IN": '{"text": "hi"}'})):
        upstream.script = [response(name, OUT="{}")]
        assert ask_rest(f"/v2/models/{name}/versions/1/generate", given).json()["OUT"] == "{}"
        assert (upstream.asked[-1].model_name, upstream.asked[-1].model_version) == (name, "1")


def test_generate_expects_one_response(ask_rest, upstream):
    for script in ([], [answer(), answer()]):
        upstream.script = script
        got = ask_rest(GENERATE, {"text_input": "hi"})
        assert got.status_code == 400 and "exactly 1 response" in got.json()["error"]


def test_generate_stream_sends_events(ask_rest, upstream):
    upstream.script = [answer("h", [5], ""), answer("o", [6], "length")]
    got = ask_rest(STREAM, {"text_input": "hi", "stream": True})
    assert got.status_code == 200 and got.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, last, nothing = got.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["text_output"] == "h" and nothing == ""
    assert json.loads(last.removeprefix("data: "))["finish_reason"] == "length"


def test_errors_of_a_stream(ask_rest, upstream):
    """The first event decides the status, as with Triton; later errors are events."""
    for failure, code in (("INVALID_ARG: top_k", 400), ("UNAVAILABLE: 40 requests wait", 503), ("INTERNAL: x", 500),
                          ("CANCELLED: the request was cancelled", 503),
                          (TritonFailure(grpc.StatusCode.UNAVAILABLE, "being started"), 503)):  # fmt: skip
        words = str(failure).rpartition(": ")[2]
        upstream.script = [failure]
        got = ask_rest(STREAM, {"text_input": "hi"})
        assert got.status_code == code and words in json.loads(got.text.removeprefix("data: "))["error"]
        assert ("retry-after" in got.headers) == (code == 503)
        plain = ask_rest(GENERATE, {"text_input": "hi"})
        assert plain.status_code == code and words in plain.json()["error"]
        assert ("retry-after" in plain.headers) == (code == 503)
        upstream.script = [answer("h", [5], ""), failure]
        got = ask_rest(STREAM, {"text_input": "hi"})
        assert got.status_code == 200 and words in json.loads(got.text.split("\n\n")[1].removeprefix("data: "))["error"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text_input": "x", "max_tokes": 5}, "'max_tokes': model 'oarlock' has no such input"),
        ({"text_input": "x", "parameters": {"max_tokes": 5}}, "'max_tokes'"),
        ({"text_input": "x", "parameters": 5}, "Expected JSON object for keyword: 'parameters'"),
        ({"text_input": "x", "oarlock_cancel": "id"}, "'oarlock_cancel'"),
        ({"text_input": ["a", "b"]}, "text_input: 2 values; its shape must be [1]"),
        ({"text_input": []}, "text_input: 0 values"),
        ({"text_input": {"a": 1}}, "text_input: it must be a value"),
        ({"text_input": 5}, "text_input: it must be a text; got 5"),
        ({"text_input": "\ud800"}, "surrogate"),
        ({"messages": [{"role": "user"}]}, "messages: it must be a text"),
        ({"input_ids": [[1, 2]]}, "input_ids: lists in lists"),
        ({"input_ids": [1, True]}, "input_ids: it must be a whole number; got true"),
        ({"input_ids": [1, 2**31]}, "does not fit INT32"),
        ({"input_ids": [1.0]}, "input_ids: it must be a whole number"),
        ({"text_input": "x", "seed": 2**63}, "seed: 9223372036854775808 does not fit INT64"),
        ({"text_input": "x", "temperature": "1"}, "temperature: it must be a number"),
        ({"text_input": "x", "temperature": 1e39}, "temperature"),
        ({"text_input": "x", "temperature": -1}, "temperature"),
        ({"text_input": "x", "chat": 1}, "chat: it must be true or false"),
        ({}, "give one of text_input, messages and input_ids; got none"),
        ([], "the request"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [GENERATE, STREAM])
def test_generate_refuses_invalid_requests(ask_rest, upstream, path, given, words):
    got = ask_rest(path, given)
    assert got.status_code == 400 and words in got.json()["error"], got.text
    assert not upstream.asked


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"null", b"5", b"[" * 100_000, b'{"text_input": "x", "text_input": "y"}', b'{"temperature": NaN}',
     b'{"text_input": "x", "max_tokens": ' + b"9" * 5000 + b"}", b'{"text_input": "x", "temperature": 1e999}',
     b'{"text_input": "x", "stop": ' + b"[" * 60 + b"]" * 60 + b"}", "{}".encode("utf-16")],
)  # fmt: skip
@pytest.mark.parametrize("path", [GENERATE, INFER])
def test_invalid_json_is_refused(ask_rest, upstream, path, body):
    got = ask_rest(path, body)
    assert got.status_code == 400 and got.json()["error"] and not upstream.asked


@pytest.mark.parametrize(
    "body",
    [b'{"seed": ' + b"9" * 95_000 + b"}", b'{"temperature": 1' + b"0" * 95_000 + b".5}", b'{"input_ids": [' + b"1," * 45_000 + b"1]}",
     b"{" + b'"a": 1, ' * 12_000 + b'"a": 1}', b'{"a": [' + b"{}," * 30_000 + b"{}]}", b'{"stop": [' + b'"a",' * 24_000 + b'"a"]}'],
    ids=lambda body: body[:16].decode(),
)  # fmt: skip
def test_large_bodies_are_cheap(ask_rest, upstream, body):
    """A hundredth of the largest body must take little processor time."""
    ask_rest(GENERATE, {"text_input": "hi"})  # first imports
    start = time.process_time()
    assert ask_rest(GENERATE, body).status_code == 400
    assert time.process_time() - start < 2 and len(upstream.asked) == 1


def test_server_and_model_metadata(ask_rest):
    assert ask_rest("/v2").json() == {
        "name": "triton",
        "version": "2.51.0",
        "extensions": ["classification", "statistics"],
    }
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/oarlock/ready",
        "/v2/models/oarlock/versions/1/ready",
    ):
        got = ask_rest(path)
        assert (got.status_code, got.content) == (200, b""), path
    assert ask_rest("/v2/models/oarlock").json()["inputs"] == [{"name": "seed", "datatype": "INT64", "shape": [1]}]
    config = ask_rest("/v2/models/oarlock/config").json()
    assert config["name"] == "oarlock" and config["input"][0]["dims"] == [1] and config["max_batch_size"] == 0
    for path in ("/v2/models/stats", "/v2/models/oarlock/stats"):
        (stats,) = ask_rest(path).json()["model_stats"]
        assert stats["inference_count"] == 5 and stats["inference_stats"]["success"] == {"count": 5, "ns": 7}


def test_unknown_paths_are_refused(ask_rest, upstream):
    for path in ("/", "/v1", "/v2/", "/v2/health", "/v2/repository/index", "/v2/repository/models/oarlock/load", "/v2/systemsharedmemory/status",
                 "/v2/systemsharedmemory/region/x/register", "/v2/cudasharedmemory/status", "/v2/trace/setting", "/v2/models/oarlock/trace/setting",
                 "/v2/logging", "/v2/models", "/v2/models/oarlock/versions/x", "/v2/models/oarlock/infer/", "/v2/models/../repository/index",
                 "/v2/models/a/b/c/infer", "/v2/models/oarlock/versions/" + "9" * 30 + "/infer"):  # fmt: skip
        for method in ("GET", "POST"):
            assert ask_rest(path, method=method).status_code == 404, path
    for path in (
        "/v2/models/evil/infer",
        "/v2/models/%2e%2e/config",
        "/v2/models/oarlock%00/config",
        "/v2/models/OARLOCK",
    ):
        got = ask_rest(path, method="POST" if path.endswith("infer") else "GET")
        assert got.status_code == 404 and "unknown model" in got.json()["error"]
    assert not upstream.asked


def test_unknown_methods_are_refused(ask_rest):
    for path, method in ((GENERATE, "GET"), (INFER, "GET"), (STREAM, "HEAD"), ("/v2", "POST"), ("/v2/health/ready", "POST"), ("/v2/models/oarlock", "POST")):  # fmt: skip
        got = ask_rest(path, method=method)
        assert got.status_code == 405 and got.headers["allow"] in ("GET", "POST")


def test_requests_while_triton_is_down(ask_rest, upstream):
    upstream.is_away = True
    for path, given in ((GENERATE, {"text_input": "x"}), (STREAM, {"text_input": "x"}), (INFER, {"inputs": [ONE]}), ("/v2", None), ("/v2/health/ready", None), ("/v2/models/oarlock", None)):  # fmt: skip
        got = ask_rest(path, given)
        assert got.status_code == 503 and got.headers["retry-after"] and got.json()["error"], path
    assert ask_rest("/v2/health/live").status_code == 200  # this process is


@pytest.mark.parametrize(
    ("path", "given", "after"),
    [(GENERATE, {"text_input": "x"}, []), (STREAM, {"text_input": "x"}, []), (INFER, {"inputs": [ONE]}, []),
     (STREAM, {"text_input": "x"}, [answer("h", [5], "")])],
)  # fmt: skip
def test_a_disconnected_client_cancels_its_rest_request(upstream, path, given, after):
    upstream.script = [*after, ...]
    app = make_rest_app(OPTIONS, upstream)
    body = json.dumps(given).encode()

    async def run():
        upstream.going = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent = []

        async def receive():
            if messages:
                return messages.pop()
            await upstream.going.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        await asyncio.wait_for(app(scope, receive, send), 60)
        return sent

    sent = asyncio.run(run())
    assert upstream.cancelled == 1
    assert not any(message.get("status", 200) >= 400 for message in sent)
