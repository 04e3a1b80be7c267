"""Which requests reach Triton and which never do: requests of every shape, as bytes and as typed contents."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

from oarlock.errors import RequestRefused
from oarlock.serve.front.check_request import UnknownModel, check_infer_request
from oarlock.serve.front.model_forms import ModelForm, RequestLimits
from oarlock.serve.triton.fields import CANCEL, DEFAULT_TOKENS, RELAYED
from oarlock.triton_repository.inputs import INPUTS
from scripted_triton import limits, question

LIMITS = limits()
INT, FLOAT = np.array([3], "<i4").tobytes(), np.array([0.5], "<f4").tobytes()


def expect_refusal(request, words, error=RequestRefused):
    with pytest.raises(error) as caught:
        check_infer_request(request, LIMITS)
    assert words in str(caught.value), caught.value


def change_request(change, **tensors):
    request = question(**tensors)
    change(request)
    return request


def test_valid_requests_pass():
    for request in (
        question(),
        question("oarlock", stream=("BOOL", [1], b"\1"), max_tokens=("INT32", [1], INT)),
        question(temperature=("FP32", [1], FLOAT), stop_token_ids=("INT32", [3], INT * 3), stop=("BYTES", [0], b"")),
        question("oarlock_json", json.dumps({"text": "x", "max_dec_len": 3, "topp": 0.5}).encode()),
    ):
        check_infer_request(request, LIMITS)
    typed = service_pb2.ModelInferRequest(model_name="oarlock_infer", id="7", model_version="1")
    typed.inputs.add(name="input_ids", datatype="INT32", shape=[2]).contents.int_contents[:] = [5, 6]
    typed.inputs.add(name="seed", datatype="INT64", shape=[1]).contents.int64_contents[:] = [-(2**63)]
    typed.inputs.add(name="ignore_eos", datatype="BOOL", shape=[1]).contents.bool_contents[:] = [True]
    typed.outputs.add(name="text_output")
    for name, kind, value in (
        ("triton_enable_empty_final_response", "bool_param", True), ("sequence_id", "string_param", "s"),
        ("sequence_start", "bool_param", True), ("priority", "uint64_param", 1), ("timeout", "int64_param", 5),
    ):  # fmt: skip
        setattr(typed.parameters[name], kind, value)
    check_infer_request(typed, LIMITS)


@pytest.mark.parametrize(
    "shape", [[2**62], [2**31, 2**31], [2**63 - 1], [-1], [-(2**63)], [], [1, 1], [2], [0], [1] * 70_000]
)
def test_shapes_that_crash_triton_are_refused(shape):
    expect_refusal(question(max_tokens=("INT32", shape, INT)), "max_tokens: shape ")
    if shape not in ([2], [0]):
        expect_refusal(question(stop_token_ids=("INT32", shape, INT)), "stop_token_ids: ")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (question(nobody=("INT32", [1], INT)), "there is no input 'nobody' (there are: text_input"),
        (question(stream=("BOOL", [1], b"\1")), "there is no input 'stream'"),  # of a model that does not stream
        (question(max_tokens=("FP32", [1], FLOAT)), "max_tokens: data-type 'FP32', model 'oarlock_infer' expects 'INT32'"),
        (question(max_tokens=("FP99", [1], FLOAT)), "max_tokens: data-type 'FP99'"),
        (question(max_tokens=("INT32", [1], INT * 2)), "max_tokens: malformed: shape [1] has 4 bytes, got 8 bytes"),
        (question(stop_token_ids=("INT32", [90_000], INT)), "malformed: shape [90000] has 360,000 bytes, got 4 bytes"),
        (question(ignore_eos=("BOOL", [1], b"\2")), "a BOOL is a byte 0 or 1"),
        (question(stop=("BYTES", [1], b"\xff\xff\xff\xff")), "stop: malformed: element 0 is longer than the contents"),
        (question(stop=("BYTES", [1], b"\1\0\0")), "stop: malformed: element 0"),
        (question(stop=("BYTES", [1], b"\1\0\0\0a\1\0\0\0b")), "has 1 elements, got more than 1"),
        (question(stop=("BYTES", [2], b"\1\0\0\0a")), "has 2 elements, got 1"),
        (question(stop=("BYTES", [17], b"\1\0\0\0a" * 17)), "stop: at most 16 texts"),
        (question(text=b"\xff"), "text_input: not UTF-8"),
        (question(text=b"x" * 100_001), "larger than the 100,000 bytes"),
        (question(temperature=("FP32", [1], b"\0\0\xc0\x7f")), "temperature must be a finite number"),
        (question(top_p=("FP32", [1], b"\0\0\x80\x7f")), "top_p must be a finite number"),
        (question(top_p=("FP32", [1], b"\0\0\0\0")), "top_p must be above 0"),
        (question(max_tokens=("INT32", [1], b"\0\0\0\0")), "max_tokens must be at least 1"),
        (question(messages=("BYTES", [1], b"\2\0\0\0[]")), "give one of text_input, messages and input_ids"),
        (service_pb2.ModelInferRequest(model_name="oarlock"), "give one of text_input, messages and input_ids; got none"),
        (service_pb2.ModelInferRequest(model_name="oarlock_json"), "input 'IN' is missing"),
        (question("oarlock_json", b"{"), "IN: not JSON"),
        (question("oarlock_json", b'{"text": "x", "topp": 9}'), "topp must be above 0"),
        (question("oarlock_json", b'{"text": "x", "temperature": 1e999}'), "temperature must be a finite number"),
        (change_request(lambda r: setattr(r, "model_version", "-1")), "model_version '-1'"),
        (change_request(lambda r: setattr(r, "id", "a\nb")), "id: at most"),
        (change_request(lambda r: r.MergeFrom(question())), "input 'text_input' is given twice"),
        (change_request(lambda r: r.raw_input_contents.append(b"x")), "2 contents of 1 inputs"),
        (change_request(lambda r: r.raw_input_contents.pop()), "malformed: shape [1] has 1 elements, got 0"),
        (change_request(lambda r: r.inputs[0].contents.bytes_contents.append(b"x")), "contents as well as raw_input_contents"),
        (change_request(lambda r: r.outputs.add(name="nobody")), "there is no output 'nobody'"),
        (change_request(lambda r: [r.outputs.add(name="token_ids") for _ in "ab"]), "output 'token_ids' is asked for twice"),
        (change_request(lambda r: r.outputs.add(name="token_ids").parameters["classification"]), "can't be given here"),
        (change_request(lambda r: r.inputs[0].parameters["shared_memory_region"]), "'shared_memory_region' can't be given here"),
        (change_request(lambda r: r.parameters["priority"]), "parameter priority: it must be int64 or uint64"),
    ],
)  # fmt: skip
def test_refusals(request_, words):
    expect_refusal(request_, words)


def test_internal_parameters_are_refused():
    for name in (CANCEL, RELAYED, DEFAULT_TOKENS, "binary_data_output", "xla"):
        request = question("oarlock")
        request.parameters[name].string_param = "x"
        expect_refusal(request, f"there is no parameter {name!r}")
    expect_refusal(
        service_pb2.ModelInferRequest(model_name="nobody"), "unknown model: 'nobody' is not found", UnknownModel
    )


def test_typed_contents():
    request = service_pb2.ModelInferRequest(model_name="oarlock_infer")
    tensor = request.inputs.add(name="input_ids", datatype="INT32", shape=[2**20])
    tensor.contents.int_contents[:] = [1]
    expect_refusal(request, "input_ids: shape [1048576], it must be [n]")
    tensor.shape[:] = [7]
    expect_refusal(request, "malformed: shape [7] has 7 elements, got 1")
    tensor.contents.fp32_contents[:] = [1.0]
    expect_refusal(request, "input_ids: fp32_contents for INT32; it must be int_contents")


def test_a_custom_model_is_checked_by_its_configuration():
    """Its own configuration is what counts; values are its own business."""
    config = ModelConfig(name="m", backend="onnxruntime", max_batch_size=4)
    config.input.add(name="x", data_type=11, dims=[-1, 3])
    config.output.add(name="y", data_type=11, dims=[1])
    known = RequestLimits({"m": ModelForm.from_config(config)}, 1000)

    def ask(shape, raw, **parameters):
        request = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[raw])
        request.inputs.add(name="x", datatype="FP32", shape=shape)
        for name in parameters:
            request.parameters[name].string_param = "v"
        check_infer_request(request, known)

    ask([2, 5, 3], b"\0\0\xc0\x7f" * 30, own="v")
    for shape, raw in (
        ([5, 1, 3], b"\0" * 60),
        ([1, 1, 2], b"\0" * 8),
        ([0, 2**40, 3], b""),
        ([1, 300, 3], b"\0" * 3600),
    ):
        with pytest.raises(RequestRefused):
            ask(shape, raw)
    with pytest.raises(RequestRefused, match="oarlock_relayed"):
        ask([1, 1, 3], b"\0" * 12, oarlock_relayed="v")


KINDS = {"BYTES": "", "INT32": "<i4", "INT64": "<i8", "FP32": "<f4", "BOOL": "|b1", "FP64": "<f8"}


@st.composite
def draw_request(draw):
    """Mostly valid requests, so that accepted ones are tested too."""
    request = service_pb2.ModelInferRequest(model_name=draw(st.sampled_from(["oarlock", "oarlock_infer"])))
    for name in draw(st.lists(st.sampled_from(sorted(INPUTS)), min_size=1, max_size=4, unique=True)):
        is_list, right = INPUTS[name].is_list, INPUTS[name].datatype.replace("STRING", "BYTES")
        datatype = draw(st.sampled_from([right] * 9 + list(KINDS)))
        count = draw(st.integers(0, 3)) if is_list else 1
        shape = draw(st.sampled_from([[count]] * 9 + [[count, 1], [2**61], [-1], []]))
        if datatype == "BYTES":
            texts = draw(st.lists(st.sampled_from([b"a", b"[]", b"\xff", b"" * 4]), min_size=count, max_size=count))
            raw = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        else:
            size = np.dtype(KINDS[datatype]).itemsize * count
            raw = draw(st.sampled_from([b"\1", b"\0", b"\xff"])) + bytes(size - 1) if size else b""
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(draw(st.sampled_from([raw] * 9 + [raw[:-1], raw * 2])))
    return request


@given(draw_request())
@settings(max_examples=400, deadline=None)
def test_passed_requests_have_as_many_bytes_as_their_shape(request):
    try:
        check_infer_request(request, LIMITS)
    except RequestRefused as error:
        assert str(error) and "\n" not in str(error)
        return
    names = [tensor.name for tensor in request.inputs]
    assert len(set(names)) == len(names) == len(request.raw_input_contents)
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        count = math.prod(tensor.shape)
        assert len(tensor.shape) == 1 and (count == 1 or INPUTS[tensor.name].is_list)
        if tensor.datatype == "BYTES":
            assert len(raw) >= 4 * count
        else:
            values = np.frombuffer(raw, KINDS[tensor.datatype])
            assert values.size == count and np.isfinite(values).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"role": "user", "content": "x", "content": "y"}]', "messages:1: field"),
        ('[{"role": "user", "content": "x", "name": ' + "[" * 70 + "]" * 70 + "}]", "64 levels|name|deep"),
    ],
)
def test_json_inside_a_text_is_parsed_strictly(text, words):
    content = text.encode()
    request = service_pb2.ModelInferRequest(model_name="oarlock_infer")
    request.inputs.add(name="messages", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(content).to_bytes(4, "little") + content)
    with pytest.raises(RequestRefused, match=words):
        check_infer_request(request, LIMITS)
