"""The check of requests before Triton: a passed request has exactly the bytes, names and numbers that it declares.

Inputs are serialized requests; bytes that are none choose changes of the fields of one.
"""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from harness import Harness
from tritonclient.grpc import service_pb2

from oarlock.serve.front.check_request import check_infer_request
from oarlock.triton_repository.inputs import INPUTS
from scripted_triton import CONFIGS, limits, question

LIMITS = limits()
SIZES = {"INT32": 4, "INT64": 8, "FP32": 4, "BOOL": 1}
WILD_NUMBERS = (0, 1, -1, 2, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
WILD_TEXTS = ("", "x", "oarlock", "oarlock_json", "IN", "OUT", "\0", "\n", "a" * 300, "1", "-1", *INPUTS)
WILD_TYPES = ("BYTES", "INT32", "INT64", "FP32", "FP64", "BOOL", "UINT8", "FP16", "BF16", "FP99", "")
PARAMETERS = (
    *("oarlock_relayed", "oarlock_cancel", "oarlock_default_tokens", "shared_memory_region", "classification"),
    *("triton_enable_empty_final_response", "sequence_id", "priority", "timeout", "binary_data_size"),
)
FORM = {"text": "x", "topp": 0.5, "max_dec_len": 3, "eos_token_ids": [5], "req_id": "r", "stop": ["a"]}


def change_request(data: bytes) -> service_pb2.ModelInferRequest:
    """A request with a few fields changed; the bytes choose the changes."""
    choose = random.Random(data)
    request = service_pb2.ModelInferRequest.FromString(choose.choice(seeds()))
    for _ in range(choose.randint(1, 5)):
        tensor = choose.choice(request.inputs) if request.inputs else request.inputs.add()
        match choose.randrange(11):
            case 0:
                tensor.shape[:] = [choose.choice(WILD_NUMBERS) for _ in range(choose.randint(0, 3))]
            case 1:
                tensor.datatype = choose.choice(WILD_TYPES)
            case 2:
                tensor.name = choose.choice(WILD_TEXTS)
            case 3:
                request.parameters[choose.choice(PARAMETERS)].string_param = choose.choice(WILD_TEXTS)
            case 4:
                request.parameters[choose.choice(PARAMETERS)].int64_param = choose.choice(WILD_NUMBERS)
            case 5:
                tensor.parameters[choose.choice(PARAMETERS)].bool_param = True
            case 6:
                request.model_name = choose.choice((*CONFIGS, *WILD_TEXTS))
            case 7:
                request.outputs.add(name=choose.choice(("text_output", "OUT", *WILD_TEXTS)))
            case 8:
                tensor.contents.int_contents.extend([1] * choose.randint(0, 9))
            case 9 if request.raw_input_contents:
                place = choose.randrange(len(request.raw_input_contents))
                request.raw_input_contents[place] = choose.choice(
                    (data[:40], b"", b"\xff" * 4, b"\0\0\xc0\x7f", len(data).to_bytes(4, "little") + data)
                )
            case _:
                request.MergeFrom(service_pb2.ModelInferRequest.FromString(choose.choice(seeds())))
    return request


def read(data: bytes) -> service_pb2.ModelInferRequest:
    """Parse an input as a request."""
    try:
        return service_pb2.ModelInferRequest.FromString(data)
    except DecodeError:
        return change_request(data)


def target(data: bytes, folder: Path) -> None:
    request = read(data)
    check_infer_request(request, LIMITS)
    assert request.model_name in CONFIGS and not set(request.parameters) & set(PARAMETERS[:5])
    names = [tensor.name for tensor in request.inputs]
    assert len(names) == len(set(names)) and not any(tensor.parameters for tensor in request.inputs)
    known = {one.name: one for one in CONFIGS[request.model_name].input}
    for i, tensor in enumerate(request.inputs):
        count = math.prod(tensor.shape)
        assert len(tensor.shape) == 1 and 0 <= count <= LIMITS.max_body
        assert list(known[tensor.name].dims) in ([count], [-1])
        if request.raw_input_contents and tensor.datatype != "BYTES":
            raw = request.raw_input_contents[i]
            assert len(raw) == count * SIZES[tensor.datatype]
            assert tensor.datatype != "FP32" or np.isfinite(np.frombuffer(raw, "<f4")).all()


@functools.cache
def seeds() -> list[bytes]:
    whole, number = np.array([3], "<i4").tobytes(), np.array([0.5], "<f4").tobytes()
    many = {
        name: {str: ("BYTES", [1], b"\2\0\0\0[]"), bool: ("BOOL", [1], b"\1"), float: ("FP32", [1], number)}.get(
            kind, ("INT64", [1], whole * 2) if name == "seed" else ("INT32", [1], whole)
        )
        for name, kind in ((name, tensor.kind) for name, tensor in INPUTS.items())
        if name not in ("text_input", "messages", "input_ids")
    }
    typed = service_pb2.ModelInferRequest(model_name="oarlock_infer", id="7", model_version="1")
    typed.inputs.add(name="input_ids", datatype="INT32", shape=[2]).contents.int_contents[:] = [5, 6]
    typed.inputs.add(name="top_p", datatype="FP32", shape=[1]).contents.fp32_contents[:] = [0.5]
    typed.outputs.add(name="token_ids")
    typed.parameters["triton_enable_empty_final_response"].bool_param = True
    requests = [
        question(),
        question("oarlock", **many),
        question("oarlock", stop=("BYTES", [2], b"\1\0\0\0a\1\0\0\0b"), stop_token_ids=("INT32", [3], whole * 3)),
        question("oarlock_json", json.dumps(FORM).encode()),
        typed,
    ]
    return [request.SerializeToString() for request in requests]


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        *(name.encode() for name in INPUTS),
        *(name.encode() for name in PARAMETERS),
        *(name.encode() for name in WILD_TYPES if name),
        *(name.encode() for name in CONFIGS),
        b"\x80" * 9 + b"\x01",
        b"\xff" * 9 + b"\x01",
        b"\0\0\xc0\x7f",
        b"\xff\xff\xff\xff",
    ],
)
