"""What a server refuses without failing: fuzzing over gRPC and HTTP, full queues, disconnecting clients."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import grpc
import httpx
import hypothesis.strategies as st
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from tritonclient.grpc import InferenceServerClient, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from serving import ENDLESS, GUARD_S, KEY, GrpcStream, chat_tensors, tensor

NAMES = [
    "text_input",
    "messages",
    "input_ids",
    "chat",
    "stream",
    "adapter",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "ignore_eos",
    "nobody",
]
TYPES = {
    "BYTES": None,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "FP64": np.float64,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}


@st.composite
def wild_tensors(draw):
    """A request with arbitrary names, dtypes, shapes and sizes, and with contents that may not fit them."""
    request = service_pb2.ModelInferRequest()
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        made = request.inputs.add()
        made.name = name
        if name == "text_input" and draw(st.integers(0, 3)):  # most have a valid prompt
            made.datatype = "BYTES"
            made.shape.append(1)
            request.raw_input_contents.append(b"\x01\0\0\0x")
            continue
        made.datatype = draw(st.sampled_from([*TYPES, "BYTES", "BYTES", "FP99"]))
        made.shape.extend(draw(st.sampled_from([[1], [1], [1], [2], [0], [1, 1], [-1], [], [2**40]])))
        if made.datatype == "BYTES":
            texts = draw(st.lists(st.binary(max_size=12), min_size=1, max_size=2))
            content = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
            content = draw(
                st.sampled_from([content, content, content[:-1], b"\xff\xff\xff\xff", b"\xff\xff\xff\x7fabc", b""])
            )
        else:
            content = draw(
                st.one_of(
                    st.binary(max_size=16),
                    st.sampled_from([b"\x01", b"\x01\0\0\0", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 8]),
                )
            )
        request.raw_input_contents.append(content)
    return request


def test_arbitrary_tensors_are_refused_as_invalid(server):
    """Over gRPC, for all three models; the server works afterwards."""
    channel = grpc.insecure_channel(server.grpc_url)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    metadata = tuple(server.headers.items())
    processes = server.processes()
    counts = {"refused": 0, "answered": 0}

    def ask_once(request):
        """Return the error, or "" for an answer."""
        request.model_name = "oarlock_infer"
        try:
            stub.ModelInfer(request, timeout=GUARD_S, metadata=metadata)
            counts["answered"] += 1
            return ""
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, (error.code(), error.details())
            counts["refused"] += 1
            return error.details()

    def ask_stream(request, model):
        """Return the error; in a stream, errors are messages."""
        request.model_name = model
        answers = list(stub.ModelStreamInfer(iter([request]), timeout=GUARD_S, metadata=metadata))
        return next((answer.error_message for answer in answers if answer.error_message), "")

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(wild_tensors())
    def fuzz(request):
        if not any(made.name == "max_tokens" for made in request.inputs):
            request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
            request.raw_input_contents.append(b"\x02\0\0\0")
        refusal = ask_once(request)
        if not any(made.name == "stream" for made in request.inputs):
            streamed = ask_stream(request, "oarlock")
            assert streamed.replace("oarlock", "oarlock_infer").replace(", stream,", ",") == refusal

    fuzz()
    for text in (b"\xff\xfe", b"{", b"[]", b"{}", b'{"text": 5}', b'{"text": "x", "topp": "y"}', b'{"text": "x", "hm": 1}',
                 b'{"text": "x", "max_dec_len": 99999999999}', b'{"text": "x", "temperature": NaN}', b"[" * 5000):  # fmt: skip
        broken = service_pb2.ModelInferRequest(raw_input_contents=[len(text).to_bytes(4, "little") + text])
        broken.inputs.add(name="IN", datatype="BYTES", shape=[1])
        assert ask_stream(broken, "oarlock_json").startswith(
            ("IN: ", "give one of text, ", "text: ", "topp: ", "max_dec_len: ", "temperature")
        ), text
    channel.close()
    assert counts["refused"] > 100 and counts["answered"] > 0, counts
    assert server.processes() == processes
    seen = server.metric("oarlock_front_requests_total", door="grpc", route="ModelInfer", code="INVALID_ARGUMENT")
    assert seen >= counts["refused"] and server.metric("oarlock_restarts_total") == 0
    assert server.generate(text_input="x", max_tokens=3)["completion_tokens"] == 3
    assert "Traceback" not in server.said()


def test_every_number_is_accepted_or_refused(server, client):
    """In every protocol; no number causes a server error."""
    over_grpc = InferenceServerClient(server.grpc_url)
    address, answered = f"{server.rest_url}/v2/models/oarlock/generate", 0

    def status(fields):
        return httpx.post(address, json=fields, headers=server.headers, timeout=GUARD_S).status_code

    for name in ("temperature", "repetition_penalty", "frequency_penalty", "presence_penalty", "top_p"):
        for value in (1e-45, 1e-38, 1e-30, 1.0, 1e30, 1e38, 0.0, -1e-38):
            given = {"text_input": "x", "max_tokens": 3, "seed": 1, name: value}
            one = status(given)
            tensors = [*chat_tensors("x", 3, seed=1), tensor(name, [value], "FP32")]
            try:
                over_grpc.infer("oarlock_infer", tensors, headers=server.headers)
                two = 200
            except InferenceServerException as error:
                assert error.status() == "StatusCode.INVALID_ARGUMENT", (name, value, error)
                two = 400
            extra = {"repetition_penalty": value} if name == "repetition_penalty" else {}
            try:
                plain = {} if extra else {name: value}
                client.completions.create(model="oarlock", prompt="x", max_tokens=3, extra_body=extra, **plain)
                three = 200
            except openai.BadRequestError:
                three = 400
            assert one == two and one in (200, 400) and three in (200, 400), (name, value, one, two, three)
            answered += one == 200
    assert answered > 20
    stops = {"text_input": "x", "max_tokens": 3}
    assert status(stops | {"stop": ["a"] * 5000}) == status(stops | {"stop_token_ids": [1] * 9000}) == 400
    over_grpc.close()


def test_errors_name_the_invalid_field(server):
    for fields, words in (
        ({}, "give one of text_input, messages and input_ids; got none"),
        ({"text_input": "x", "messages": "[]"}, "got text_input, messages"),
        ({"messages": "{"}, "messages: not JSON"),
        ({"messages": "[5]"}, 'messages[0] must be an object {"role"'),
        ({"messages": '[{"role": "critic", "content": "a"}]'}, "'messages[0].role' is 'critic'"),
        ({"messages": '[{"role": "user", "content": "a", "refusal": "b"}]'}, "messages[0].refusal: "),
        ({"messages": '[{"role": "user", "content": "a"}]', "tools": "{"}, "tools: not JSON"),
        ({"text_input": "x", "tools": "[]"}, "tools go with messages"),
        ({"text_input": "x", "adapter": "nobody"}, "there is no adapter 'nobody'"),
        ({"text_input": "x", "temperature": -1}, "temperature must be from 0"),
        ({"text_input": "x", "stop": ["a"] * 17}, "stop: at most 16 texts"),
        ({"text_input": "x" * 100_001}, "larger than 100,000 bytes"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.generate(**{"max_tokens": 2, **fields})
        assert refused.value.code == (413 if "larger" in words else 400)
        assert words in json.loads(refused.value.read())["error"]


def test_schemathesis(server, tmp_path):
    """Every route of the OpenAPI description, with valid and invalid input: only documented responses are returned."""
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}",
         "--max-examples", "25", "--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", str(GUARD_S), "--generation-database", "none",
         "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"],
        capture_output=True, text=True, timeout=GUARD_S, check=False, cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert httpx.get(f"{server.url}/health").status_code == 200 and "Traceback" not in server.said()


def test_a_disconnected_client_frees_its_slot(server, client):
    """In every protocol. The answers are endless, so a slot that is not freed stays taken."""
    server.wait_open(0)
    stream = client.completions.create(
        model="oarlock", prompt="x", stream=True, max_tokens=ENDLESS["max_tokens"], extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.wait_open(1)
    stream.close()
    server.wait_open(0)

    with server.asked(server.openai, "/v1/completions", {"model": "oarlock", "prompt": "x", **ENDLESS}):
        server.wait_open(1)  # a client that does not stream
    server.wait_open(0)

    tensors = chat_tensors("x", ENDLESS["max_tokens"], ignore_eos=True)
    form = json.dumps({"text": "x", "max_dec_len": ENDLESS["max_tokens"], "min_dec_len": ENDLESS["max_tokens"]})
    for model, inputs in (
        ("oarlock", [*tensors, tensor("stream", [True], "BOOL")]),
        # Through the other model, in which Triton can't cancel requests.
        ("oarlock_json", [tensor("IN", [form], "BYTES")]),
    ):
        over_grpc = GrpcStream(server)
        next(over_grpc.ask(model, inputs))
        server.wait_open(1)
        over_grpc.close()
        server.wait_open(0)

    with InferenceServerClient(server.grpc_url) as waiting:  # not streamed
        call = waiting.async_infer("oarlock_infer", tensors, lambda result, error: None, headers=server.headers)
        server.wait_open(1)
        call.cancel()
    server.wait_open(0)

    content = {"text_input": "x", **ENDLESS}
    inputs = [
        {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]},
        {"name": "max_tokens", "datatype": "INT32", "shape": [1], "data": [ENDLESS["max_tokens"]]},
        {"name": "ignore_eos", "datatype": "BOOL", "shape": [1], "data": [True]},
    ]
    for way, asked in (
        ("oarlock/generate_stream", {"stream": True, **content}),
        ("oarlock/generate", content),  # not streamed; Triton's own HTTP would generate it to the end
        ("oarlock_infer/infer", {"inputs": inputs}),
    ):
        with server.asked(server.rest, f"/v2/models/{way}", asked):
            server.wait_open(1)
        server.wait_open(0)


def test_a_full_queue_is_reported(server, client):
    """Endless answers fill 4 slots and a queue of 40."""
    server.wait_open(0)
    streams = [GrpcStream(server) for _ in range(2)]
    tensors = chat_tensors("x", ENDLESS["max_tokens"], stream=True, ignore_eos=True)
    refused = 0
    try:
        for i in range(50):
            streams[i % 2].client.async_stream_infer("oarlock", tensors)
        deadline = time.monotonic() + GUARD_S
        while refused < 6 and time.monotonic() < deadline:
            for made in streams:
                with contextlib.suppress(queue.Empty):
                    refused += isinstance(made.results.get(timeout=0.02), InferenceServerException)
        assert refused == 6
        server.wait_open(44)
        with pytest.raises(openai.APIStatusError, match="requests wait already") as busy:
            client.completions.create(model="oarlock", prompt="x")
        assert busy.value.status_code == 503
    finally:
        for made in streams:
            made.close()
    server.wait_open(0)
