"""infer over REST: tensors as JSON and in binary form, and refusals."""

from __future__ import annotations

import gzip
import json
import zlib

import numpy as np
import pytest
import tritonclient.http as triton

from scripted_upstream import GENERATE, INFER, ONE, answer, read_inputs


def test_infer(ask_rest, upstream):
    upstream.script = [answer(model="oarlock_infer")]
    got = ask_rest(INFER, {"id": "7", "inputs": [
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
    assert read_inputs(request) == {"input_ids": [1, 2, 3, 4], "temperature": [0.5], "stop": ["a", "é"]}
    assert request.id == "7" and not request.parameters


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("outputs", [None, {"text_output": True, "token_ids": False}, {"token_ids": False}])
@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
def test_infer_with_tritonclient(ask_rest, upstream, binary_in, outputs, encoding):
    """Bodies are written and read by tritonclient."""
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
    got = ask_rest(INFER, body, **headers)
    assert got.status_code == 200, got.text
    told = got.headers.get("inference-header-content-length")
    result = triton.InferenceServerClient.parse_response_body(got.content, header_length=told and int(told))
    is_binary = outputs is None or "text_output" in outputs
    assert result.as_numpy("text_output").tolist() == [b"ho" if is_binary else "ho"] and result.as_numpy(
        "token_ids"
    ).tolist() == [5, 6]
    assert read_inputs(upstream.asked[0]) == {"text_input": ["hé"], "max_tokens": [4]}
    assert (told is None) == (outputs == {"token_ids": False}) and upstream.asked[0].id == "9"


IDS = {"name": "input_ids", "datatype": "INT32", "shape": [1], "data": [1]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "inputs: it must be a list"),
        ({"inputs": {}}, "inputs: it must be a list"),
        ({"inputs": [ONE] * 65}, "65; a request may have 64"),
        ({"inputs": [ONE, ONE]}, "given twice"),
        ({"inputs": [5]}, "inputs[0]: it must be an object"),
        ({"inputs": [ONE], "input": []}, "'input': there is no such field"),
        ({"inputs": [ONE], "id": 5}, "id: it must be a printable text"),
        ({"inputs": [ONE], "parameters": {"triton_x": 1}}, "reserved"),
        ({"inputs": [ONE], "parameters": {"oarlock_cancel": "x"}}, "'oarlock_cancel'"),
        ({"inputs": [ONE], "parameters": {"priority": [1]}}, "'priority'"),
        ({"inputs": [ONE], "parameters": {"priority": 2**64}}, "'priority'"),
        ({"inputs": [ONE], "parameters": []}, "parameters: it must be an object"),
        ({"inputs": [ONE | {"size": 5}]}, "there is no field 'size'"),
        ({"inputs": [ONE | {"name": "nobody"}]}, "there is no input 'nobody'"),
        ({"inputs": [ONE | {"datatype": "INT32", "data": [1]}]}, "data-type"),
        ({"inputs": [IDS | {"datatype": "FP16"}]}, "FP16 does not go through JSON"),
        ({"inputs": [IDS | {"datatype": "FP99"}]}, "there is no datatype 'FP99'"),
        ({"inputs": [IDS | {"shape": [2**62]}]}, "does not match the 1 values"),
        ({"inputs": [IDS | {"shape": [2**31, 2**31]}]}, "does not match the 1 values"),
        ({"inputs": [IDS | {"shape": [2**32] * 2}]}, "does not match the 1 values"),
        ({"inputs": [IDS | {"shape": [2**63]}]}, "shape: it must be a list of whole numbers"),
        ({"inputs": [IDS | {"shape": [-1]}]}, "shape: it must be a list of whole numbers"),
        ({"inputs": [IDS | {"shape": [True]}]}, "shape: it must be a list of whole numbers"),
        ({"inputs": [IDS | {"shape": 1}]}, "shape: it must be a list of whole numbers"),
        ({"inputs": [IDS | {"shape": [1, 1]}]}, "shape [1, 1]"),
        ({"inputs": [IDS | {"data": 5}]}, "data: it must be a list"),
        ({"inputs": [{**IDS, "parameters": {"binary_data_size": 4}}]}, "both are set"),
        ({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1]}]}, "no field is set"),
        ({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": 4}}]}, "Inference-Header-Content-Length"),
        ({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1], "parameters": {"shared_memory_region": "x"}}]}, "'shared_memory_region' can't be given here"),
        ({"inputs": [ONE], "outputs": [{"name": "text_output", "parameters": {"classification": 2}}]}, "'classification' can't be given here"),
        ({"inputs": [ONE], "outputs": [{"name": "text_output", "parameters": {"shared_memory_region": "x"}}]}, "'shared_memory_region' can't be given here"),
        ({"inputs": [ONE], "outputs": [{"name": "nobody"}]}, "there is no output 'nobody'"),
        ({"inputs": [ONE], "outputs": [{"name": "text_output", "parameters": {"binary_data": 1}}]}, "it must be true or false"),
        ({"inputs": [ONE], "parameters": {"binary_data_output": "yes"}}, "it must be true or false"),
        ({"inputs": [ONE, {"name": "temperature", "datatype": "FP32", "shape": [1], "data": [1e39]}]}, "temperature"),
    ],
)  # fmt: skip
def test_infer_refuses_invalid_requests(ask_rest, upstream, given, words):
    got = ask_rest(INFER, given)
    assert got.status_code == 400 and words in got.json()["error"], got.text
    assert not upstream.asked


def test_binary_tensors_of_wrong_size_are_refused(ask_rest, upstream):
    def body(size, tail):
        head = json.dumps({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": size}}]}).encode()  # fmt: skip
        return head + tail, len(head)

    for size, tail, words in ((4, b"abc", "expecting 1 additional bytes"), (4, b"abcde", "unexpected additional input data"), (-1, b"", "whole number"),
                              (8, b"x" * 8, "input_ids"), (2**64, b"abcd", "additional bytes"), (4.0, b"abcd", "whole number"), (0, b"", "input_ids")):  # fmt: skip
        content, length = body(size, tail)
        got = ask_rest(INFER, content, Inference_Header_Content_Length=str(length))
        assert got.status_code == 400 and words in got.json()["error"], got.text
    content, length = body(4, b"abcd")
    for told in ("0", "-1", "x", str(len(content) + 1), "1e3", "9" * 30, ""):
        assert ask_rest(INFER, content, Inference_Header_Content_Length=told).status_code == 400, told
    assert not upstream.asked
    upstream.script = [answer()]
    assert ask_rest(INFER, content, Inference_Header_Content_Length=str(length)).status_code == 200


def test_compressed_bodies_are_bounded(ask_rest, upstream):
    """A compression bomb is never unpacked: 1 GB of zeros in a body of 1 MB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    import tracemalloc

    tracemalloc.start()
    assert ask_rest(INFER, bomb, Content_Encoding="gzip").status_code == 413
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    for wrong in (b"", b"no gzip", gzip.compress(b"{}")[:-1], gzip.compress(b"{}") + b"x"):
        assert ask_rest(INFER, wrong, Content_Encoding="gzip").status_code == 400
    assert ask_rest(GENERATE, gzip.compress(b"{}"), Content_Encoding="gzip").status_code == 415
    assert not upstream.asked


def test_infer_of_a_streaming_model(ask_rest):
    got = ask_rest("/v2/models/oarlock/infer", {"inputs": [ONE]})
    assert got.status_code == 501 and "decoupled" in got.json()["error"]
