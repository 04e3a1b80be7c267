"""The front's REST: what Triton is asked by a request, and what comes of its answers."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import time
import zlib

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from front_ports import OPTIONS
from oarlock.serve.front.rest import make_rest_app
from oarlock.serve.triton_failure import TritonFailure
from scripted_upstream import ScriptedUpstream, answer, asked_values, response

GENERATE, STREAM, INFER = (f"/v2/models/{rest}" for rest in ("oarlock/generate", "oarlock/generate_stream", "oarlock_infer/infer"))  # fmt: skip


@pytest.fixture
def upstream():
    made = ScriptedUpstream()
    made.script = [answer()]
    return made


@pytest.fixture
def ask(upstream):
    """A request, answered in this thread."""
    app = make_rest_app(dataclasses.replace(OPTIONS, max_body=100_000), upstream)

    def ask(path, content=None, method=None, **headers):
        async def run():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                body = content if isinstance(content, (bytes, type(None))) else json.dumps(content).encode()
                headers_ = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method or ("GET" if content is None else "POST"), path, content=body, headers=headers_)  # fmt: skip

        return asyncio.run(run())

    return ask


def test_generate(ask, upstream):
    got = ask(GENERATE, {"text_input": "hi", "max_tokens": 4, "temperature": 0, "stop": ["a", "b"], "stop_token_ids": [], "seed": -(2**63), "chat": True})  # fmt: skip
    assert got.status_code == 200 and got.headers["content-type"] == "application/json"
    # As Triton writes it: no spaces, names in order, a list of one as its element.
    assert got.text == '{"completion_tokens":2,"finish_reason":"stop","model_name":"oarlock","model_version":"1","prompt_tokens":3,"text_output":"ho","token_ids":[5,6]}'  # fmt: skip
    (request,) = upstream.asked
    assert asked_values(request) == {"text_input": ["hi"], "max_tokens": [4], "temperature": [0], "stop": ["a", "b"], "stop_token_ids": [], "seed": [-(2**63)], "chat": [True]}  # fmt: skip
    assert request.model_name == "oarlock" and request.parameters["oarlock_relayed"].string_param


def test_generate_reads_parameters_and_an_id(ask, upstream):
    upstream.script = [response(id="r-7", text_output="é\n\u2028", token_ids=[5])]
    got = ask(GENERATE, {"text_input": "hi", "id": "r-7", "parameters": {"max_tokens": 4, "stop": "x"}})
    assert got.json() == {"id": "r-7", "model_name": "oarlock", "model_version": "1", "text_output": "é\n\u2028", "token_ids": 5}  # fmt: skip
    assert asked_values(upstream.asked[0]) == {"text_input": ["hi"], "max_tokens": [4], "stop": ["x"]}
    assert upstream.asked[0].id == "r-7"


def test_generate_of_every_model(ask, upstream):
    for name, given in (("oarlock_infer", {"text_input": "hi"}), ("oarlock_json", {"IN": '{"text": "hi"}'})):
        upstream.script = [response(name, OUT="{}")]
        assert ask(f"/v2/models/{name}/versions/1/generate", given).json()["OUT"] == "{}"
        assert (upstream.asked[-1].model_name, upstream.asked[-1].model_version) == (name, "1")


def test_generate_takes_one_response(ask, upstream):
    for script in ([], [answer(), answer()]):
        upstream.script = script
        got = ask(GENERATE, {"text_input": "hi"})
        assert got.status_code == 400 and "exactly 1 response" in got.json()["error"]


def test_events(ask, upstream):
    upstream.script = [answer("h", [5], ""), answer("o", [6], "length")]
    got = ask(STREAM, {"text_input": "hi", "stream": True})
    assert got.status_code == 200 and got.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, last, nothing = got.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["text_output"] == "h" and nothing == ""
    assert json.loads(last.removeprefix("data: "))["finish_reason"] == "length"


def test_errors_of_a_stream(ask, upstream):
    """The first event decides the status, as with Triton; afterwards an event says it."""
    for failure, code in (("INVALID_ARG: top_k", 400), ("UNAVAILABLE: 40 requests wait", 503), ("INTERNAL: x", 500),
                          ("CANCELLED: the request was cancelled", 503),
                          (TritonFailure(grpc.StatusCode.UNAVAILABLE, "being started"), 503)):  # fmt: skip
        words = str(failure).rpartition(": ")[2]
        upstream.script = [failure]
        got = ask(STREAM, {"text_input": "hi"})
        assert got.status_code == code and words in json.loads(got.text.removeprefix("data: "))["error"]
        assert ("retry-after" in got.headers) == (code == 503)
        plain = ask(GENERATE, {"text_input": "hi"})
        assert plain.status_code == code and words in plain.json()["error"]
        assert ("retry-after" in plain.headers) == (code == 503)
        upstream.script = [answer("h", [5], ""), failure]
        got = ask(STREAM, {"text_input": "hi"})
        assert got.status_code == 200 and words in json.loads(got.text.split("\n\n")[1].removeprefix("data: "))["error"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text_input": "x", "max_tokes": 5}, "'max_tokes': model 'oarlock' has no such input"),
        ({"text_input": "x", "parameters": {"max_tokes": 5}}, "'max_tokes'"),
        ({"text_input": "x", "parameters": 5}, "Expected JSON object for keyword: 'parameters'"),
        ({"text_input": "x", "oarlock_cancel": "id"}, "'oarlock_cancel'"),
        ({"text_input": ["a", "b"]}, "text_input: 2 values; its shape has to be [1]"),
        ({"text_input": []}, "text_input: 0 values"),
        ({"text_input": {"a": 1}}, "text_input: it has to be a value"),
        ({"text_input": 5}, "text_input: it has to be a text; got 5"),
        ({"text_input": "\ud800"}, "surrogate"),
        ({"messages": [{"role": "user"}]}, "messages: it has to be a text"),
        ({"input_ids": [[1, 2]]}, "input_ids: lists in lists"),
        ({"input_ids": [1, True]}, "input_ids: it has to be a whole number; got true"),
        ({"input_ids": [1, 2**31]}, "does not fit INT32"),
        ({"input_ids": [1.0]}, "input_ids: it has to be a whole number"),
        ({"text_input": "x", "seed": 2**63}, "seed: 9223372036854775808 does not fit INT64"),
        ({"text_input": "x", "temperature": "1"}, "temperature: it has to be a number"),
        ({"text_input": "x", "temperature": 1e39}, "temperature"),
        ({"text_input": "x", "temperature": -1}, "temperature"),
        ({"text_input": "x", "chat": 1}, "chat: it has to be true or false"),
        ({}, "give one of text_input, messages and input_ids; got none"),
        ([], "the request"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [GENERATE, STREAM])
def test_what_generate_refuses(ask, upstream, path, given, words):
    got = ask(path, given)
    assert got.status_code == 400 and words in got.json()["error"], got.text
    assert not upstream.asked


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"null", b"5", b"[" * 100_000, b'{"text_input": "x", "text_input": "y"}', b'{"temperature": NaN}',
     b'{"text_input": "x", "max_tokens": ' + b"9" * 5000 + b"}", b'{"text_input": "x", "temperature": 1e999}',
     b'{"text_input": "x", "stop": ' + b"[" * 60 + b"]" * 60 + b"}", "{}".encode("utf-16")],
)  # fmt: skip
@pytest.mark.parametrize("path", [GENERATE, INFER])
def test_what_is_no_json(ask, upstream, path, body):
    got = ask(path, body)
    assert got.status_code == 400 and got.json()["error"] and not upstream.asked


@pytest.mark.parametrize(
    "body",
    [b'{"seed": ' + b"9" * 95_000 + b"}", b'{"temperature": 1' + b"0" * 95_000 + b".5}", b'{"input_ids": [' + b"1," * 45_000 + b"1]}",
     b"{" + b'"a": 1, ' * 12_000 + b'"a": 1}', b'{"a": [' + b"{}," * 30_000 + b"{}]}", b'{"stop": [' + b'"a",' * 24_000 + b'"a"]}'],
    ids=lambda body: body[:16].decode(),
)  # fmt: skip
def test_large_bodies_cost_little(ask, upstream, body):
    """In processor time, a hundredth of what is allowed here."""
    ask(GENERATE, {"text_input": "hi"})  # what is imported first
    start = time.process_time()
    assert ask(GENERATE, body).status_code == 400
    assert time.process_time() - start < 2 and len(upstream.asked) == 1


def test_infer(ask, upstream):
    upstream.script = [answer(model="oarlock_infer")]
    got = ask(INFER, {"id": "7", "inputs": [
        {"name": "input_ids", "datatype": "INT32", "shape": [4], "data": [[1, 2], [3, 4]]},
        {"name": "temperature", "datatype": "FP32", "shape": [1], "data": [0.5]},
        {"name": "stop", "datatype": "BYTES", "shape": [2], "data": ["a", "é"]}]})  # fmt: skip
    assert got.text == (
        '{"model_name":"oarlock_infer","model_version":"1","outputs":['
        '{"name":"text_output","datatype":"BYTES","shape":[1],"data":["ho"]},'
        '{"name":"token_ids","datatype":"INT32","shape":[2],"data":[5,6]},'
        '{"name":"finish_reason","datatype":"BYTES","shape":[1],"data":["stop"]},'
        '{"name":"prompt_tokens","datatype":"INT32","shape":[1],"data":[3]},'
        '{"name":"completion_tokens","datatype":"INT32","shape":[1],"data":[2]}]}'
    )
    (request,) = upstream.asked
    assert asked_values(request) == {"input_ids": [1, 2, 3, 4], "temperature": [0.5], "stop": ["a", "é"]}
    assert request.id == "7" and not request.parameters


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("outputs", [None, {"text_output": True, "token_ids": False}, {"token_ids": False}])
@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
def test_infer_as_tritonclient_asks(ask, upstream, binary_in, outputs, encoding):
    """With its own writer and reader of bodies."""
    made = [triton.InferInput("text_input", [1], "BYTES"), triton.InferInput("max_tokens", [1], "INT32")]
    made[0].set_data_from_numpy(np.array(["hé".encode()], object), binary_data=binary_in)
    made[1].set_data_from_numpy(np.array([4], np.int32), binary_data=True)
    wanted = None if outputs is None else [triton.InferRequestedOutput(*one) for one in outputs.items()]
    body, length = triton.InferenceServerClient.generate_request_body(made, wanted, request_id="9")
    headers = {"Inference_Header_Content_Length": str(length)}
    if encoding:
        body = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
        headers["Content_Encoding"] = encoding
    upstream.script = [answer(model="oarlock_infer")]
    got = ask(INFER, body, **headers)
    assert got.status_code == 200, got.text
    told = got.headers.get("inference-header-content-length")
    result = triton.InferenceServerClient.parse_response_body(got.content, header_length=told and int(told))
    is_binary = outputs is None or "text_output" in outputs
    assert result.as_numpy("text_output").tolist() == [b"ho" if is_binary else "ho"] and result.as_numpy(
        "token_ids"
    ).tolist() == [5, 6]
    assert asked_values(upstream.asked[0]) == {"text_input": ["hé"], "max_tokens": [4]}
    assert (told is None) == (outputs == {"token_ids": False}) and upstream.asked[0].id == "9"


ONE = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}
IDS = {"name": "input_ids", "datatype": "INT32", "shape": [1], "data": [1]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "inputs: it has to be a list"),
        ({"inputs": {}}, "inputs: it has to be a list"),
        ({"inputs": [ONE] * 65}, "65; a request may have 64"),
        ({"inputs": [ONE, ONE]}, "given twice"),
        ({"inputs": [5]}, "inputs[0]: it has to be an object"),
        ({"inputs": [ONE], "input": []}, "'input': there is no such field"),
        ({"inputs": [ONE], "id": 5}, "id: it has to be a text"),
        ({"inputs": [ONE], "parameters": {"triton_x": 1}}, "reserved"),
        ({"inputs": [ONE], "parameters": {"oarlock_cancel": "x"}}, "'oarlock_cancel'"),
        ({"inputs": [ONE], "parameters": {"priority": [1]}}, "'priority'"),
        ({"inputs": [ONE], "parameters": {"priority": 2**64}}, "'priority'"),
        ({"inputs": [ONE], "parameters": []}, "parameters: it has to be an object"),
        ({"inputs": [ONE | {"size": 5}]}, "there is no field 'size'"),
        ({"inputs": [ONE | {"name": "nobody"}]}, "there is no input 'nobody'"),
        ({"inputs": [ONE | {"datatype": "INT32", "data": [1]}]}, "data-type"),
        ({"inputs": [IDS | {"datatype": "FP16"}]}, "FP16 does not go through JSON"),
        ({"inputs": [IDS | {"datatype": "FP99"}]}, "there is no datatype 'FP99'"),
        ({"inputs": [IDS | {"shape": [2**62]}]}, "does not match the 1 values"),
        ({"inputs": [IDS | {"shape": [2**31, 2**31]}]}, "does not match the 1 values"),
        ({"inputs": [IDS | {"shape": [2**32] * 2}]}, "does not match the 1 values"),
        ({"inputs": [IDS | {"shape": [2**63]}]}, "shape: it has to be a list of whole numbers"),
        ({"inputs": [IDS | {"shape": [-1]}]}, "shape: it has to be a list of whole numbers"),
        ({"inputs": [IDS | {"shape": [True]}]}, "shape: it has to be a list of whole numbers"),
        ({"inputs": [IDS | {"shape": 1}]}, "shape: it has to be a list of whole numbers"),
        ({"inputs": [IDS | {"shape": [1, 1]}]}, "shape [1, 1]"),
        ({"inputs": [IDS | {"data": 5}]}, "data: it has to be a list"),
        ({"inputs": [{**IDS, "parameters": {"binary_data_size": 4}}]}, "both are set"),
        ({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1]}]}, "no field is set"),
        ({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": 4}}]}, "Inference-Header-Content-Length"),
        ({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1], "parameters": {"shared_memory_region": "x"}}]}, "'shared_memory_region' can't be given here"),
        ({"inputs": [ONE], "outputs": [{"name": "text_output", "parameters": {"classification": 2}}]}, "'classification' can't be given here"),
        ({"inputs": [ONE], "outputs": [{"name": "text_output", "parameters": {"shared_memory_region": "x"}}]}, "'shared_memory_region' can't be given here"),
        ({"inputs": [ONE], "outputs": [{"name": "nobody"}]}, "there is no output 'nobody'"),
        ({"inputs": [ONE], "outputs": [{"name": "text_output", "parameters": {"binary_data": 1}}]}, "it has to be true or false"),
        ({"inputs": [ONE], "parameters": {"binary_data_output": "yes"}}, "it has to be true or false"),
        ({"inputs": [ONE, {"name": "temperature", "datatype": "FP32", "shape": [1], "data": [1e39]}]}, "temperature"),
    ],
)  # fmt: skip
def test_what_infer_refuses(ask, upstream, given, words):
    got = ask(INFER, given)
    assert got.status_code == 400 and words in got.json()["error"], got.text
    assert not upstream.asked


def test_binary_tensors_of_wrong_sizes(ask, upstream):
    def body(size, tail):
        head = json.dumps({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": size}}]}).encode()  # fmt: skip
        return head + tail, len(head)

    for size, tail, words in ((4, b"abc", "expecting 1 additional bytes"), (4, b"abcde", "unexpected additional input data"), (-1, b"", "whole number"),
                              (8, b"x" * 8, "input_ids"), (2**64, b"abcd", "additional bytes"), (4.0, b"abcd", "whole number"), (0, b"", "input_ids")):  # fmt: skip
        content, length = body(size, tail)
        got = ask(INFER, content, Inference_Header_Content_Length=str(length))
        assert got.status_code == 400 and words in got.json()["error"], got.text
    content, length = body(4, b"abcd")
    for told in ("0", "-1", "x", str(len(content) + 1), "1e3", "9" * 30, ""):
        assert ask(INFER, content, Inference_Header_Content_Length=told).status_code == 400, told
    assert not upstream.asked
    upstream.script = [answer()]
    assert ask(INFER, content, Inference_Header_Content_Length=str(length)).status_code == 200


def test_bodies_that_unpack_to_more(ask, upstream):
    """A bomb is never unpacked: 1 GB of zeros in a body of 1 MB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    import tracemalloc

    tracemalloc.start()
    assert ask(INFER, bomb, Content_Encoding="gzip").status_code == 413
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    for wrong in (b"", b"no gzip", gzip.compress(b"{}")[:-1], gzip.compress(b"{}") + b"x"):
        assert ask(INFER, wrong, Content_Encoding="gzip").status_code == 400
    assert ask(GENERATE, gzip.compress(b"{}"), Content_Encoding="gzip").status_code == 415
    assert not upstream.asked


def test_infer_of_a_model_that_streams(ask):
    got = ask("/v2/models/oarlock/infer", {"inputs": [ONE]})
    assert got.status_code == 501 and "decoupled" in got.json()["error"]


def test_what_is_told_of_server_and_models(ask):
    assert ask("/v2").json() == {"name": "triton", "version": "2.51.0", "extensions": ["classification", "statistics"]}
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/oarlock/ready",
        "/v2/models/oarlock/versions/1/ready",
    ):
        got = ask(path)
        assert (got.status_code, got.content) == (200, b""), path
    assert ask("/v2/models/oarlock").json()["inputs"] == [{"name": "seed", "datatype": "INT64", "shape": [1]}]
    config = ask("/v2/models/oarlock/config").json()
    assert config["name"] == "oarlock" and config["input"][0]["dims"] == [1] and config["max_batch_size"] == 0
    for path in ("/v2/models/stats", "/v2/models/oarlock/stats"):
        (stats,) = ask(path).json()["model_stats"]
        assert stats["inference_count"] == 5 and stats["inference_stats"]["success"] == {"count": 5, "ns": 7}


def test_other_addresses(ask, upstream):
    for path in ("/", "/v1", "/v2/", "/v2/health", "/v2/repository/index", "/v2/repository/models/oarlock/load", "/v2/systemsharedmemory/status",
                 "/v2/systemsharedmemory/region/x/register", "/v2/cudasharedmemory/status", "/v2/trace/setting", "/v2/models/oarlock/trace/setting",
                 "/v2/logging", "/v2/models", "/v2/models/oarlock/versions/x", "/v2/models/oarlock/infer/", "/v2/models/../repository/index",
                 "/v2/models/a/b/c/infer", "/v2/models/oarlock/versions/" + "9" * 30 + "/infer"):  # fmt: skip
        for method in ("GET", "POST"):
            assert ask(path, method=method).status_code == 404, path
    for path in (
        "/v2/models/evil/infer",
        "/v2/models/%2e%2e/config",
        "/v2/models/oarlock%00/config",
        "/v2/models/OARLOCK",
    ):
        got = ask(path, method="POST" if path.endswith("infer") else "GET")
        assert got.status_code == 404 and "unknown model" in got.json()["error"]
    assert not upstream.asked


def test_other_methods(ask):
    for path, method in ((GENERATE, "GET"), (INFER, "GET"), (STREAM, "HEAD"), ("/v2", "POST"), ("/v2/health/ready", "POST"), ("/v2/models/oarlock", "POST")):  # fmt: skip
        got = ask(path, method=method)
        assert got.status_code == 405 and got.headers["allow"] in ("GET", "POST")


def test_while_triton_is_away(ask, upstream):
    upstream.is_away = True
    for path, given in ((GENERATE, {"text_input": "x"}), (STREAM, {"text_input": "x"}), (INFER, {"inputs": [ONE]}), ("/v2", None), ("/v2/health/ready", None), ("/v2/models/oarlock", None)):  # fmt: skip
        got = ask(path, given)
        assert got.status_code == 503 and got.headers["retry-after"] and got.json()["error"], path
    assert ask("/v2/health/live").status_code == 200  # this process is


@pytest.mark.parametrize(
    ("path", "given", "after"),
    [(GENERATE, {"text_input": "x"}, []), (STREAM, {"text_input": "x"}, []), (INFER, {"inputs": [ONE]}, []),
     (STREAM, {"text_input": "x"}, [answer("h", [5], "")])],
)  # fmt: skip
def test_a_client_that_goes_away_ends_its_request(upstream, path, given, after):
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
