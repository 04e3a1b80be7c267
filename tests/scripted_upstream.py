"""A stand-in for Triton with the models of an export: it records requests and answers as a test scripts it."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from oarlock.serve.triton.client import TritonClient, TritonFailure
from oarlock.triton_repository.config_pbtxt import make_template_config

MODELS = ("oarlock", "oarlock_infer", "oarlock_json")
GENERATE = "/v2/models/oarlock/generate"
STREAM = "/v2/models/oarlock/generate_stream"
INFER = "/v2/models/oarlock_infer/infer"
ONE = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}


class ScriptedUpstream(TritonClient):
    """A Triton client without a connection. `script` holds the events of streams: responses, error texts,
    TritonFailures.
    """

    def __init__(self):
        self.asked, self.script, self.is_away = [], [], False
        self.to_one = None  # the response to a unary call, if it is not the first of the script
        self.going, self.cancelled = asyncio.Event(), 0  # a script that ends with ... waits for the client to leave

    async def is_server_ready(self):
        return not self.is_away

    async def is_model_ready(self, model):
        return not self.is_away

    async def close(self):
        pass

    async def call(self, method, request, timeout=None):
        if self.is_away:
            raise TritonFailure(grpc.StatusCode.UNAVAILABLE, "the model is being started; try again soon")
        if method == "ModelConfig":
            return service_pb2.ModelConfigResponse(config=config(request.name))
        self.asked.append(request)
        if method == "ModelInfer":
            return self.to_one or await anext(self._play())
        return {
            "ServerMetadata": service_pb2.ServerMetadataResponse(name="triton", version="2.51.0", extensions=["classification", "model_repository", "system_shared_memory", "logging", "statistics"]),
            "ModelMetadata": service_pb2.ModelMetadataResponse(name="oarlock", versions=["1"], platform="python", inputs=[{"name": "seed", "datatype": "INT64", "shape": [1]}]),
            "ModelReady": service_pb2.ModelReadyResponse(ready=True),
            "ModelStatistics": service_pb2.ModelStatisticsResponse(model_stats=[{"name": "oarlock", "version": "1", "inference_count": 5, "inference_stats": {"success": {"count": 5, "ns": 7}}}]),
        }[method]  # fmt: skip

    async def stream(self, request, timeout=None):
        if self.is_away:
            raise TritonFailure(grpc.StatusCode.UNAVAILABLE, "the model is being started; try again soon")
        self.asked.append(request)
        async for item in self._play():
            yield item if isinstance(item, service_pb2.ModelStreamInferResponse) else service_pb2.ModelStreamInferResponse(infer_response=item)  # fmt: skip

    async def _play(self):
        for item in self.script:
            if item is ...:
                try:
                    self.going.set()
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
            if isinstance(item, TritonFailure):
                raise item
            yield service_pb2.ModelStreamInferResponse(error_message=item) if isinstance(item, str) else item


def config(name) -> model_config_pb2.ModelConfig:
    """The configuration of a model of an export."""
    found = model_config_pb2.ModelConfig.FromString(make_template_config(name).SerializeToString())  # fmt: skip
    found.name = name
    return found


def response(model="oarlock", id="", **tensors) -> service_pb2.ModelInferResponse:
    """A response with these output values: texts, integers, or arrays."""
    made = service_pb2.ModelInferResponse(model_name=model, model_version="1", id=id)
    for name, value in tensors.items():
        array = value if isinstance(value, np.ndarray) else np.array(*((([value.encode()], object)) if isinstance(value, str) else ([value] if isinstance(value, int) else value, np.int32)))  # fmt: skip
        made.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        made.raw_output_contents.append(serialize_byte_tensor(array).item() if array.dtype == object else array.tobytes())  # fmt: skip
    return made


def answer(text="ho", ids=(5, 6), end="stop", model="oarlock") -> service_pb2.ModelInferResponse:
    """An answer of the streaming model."""
    return response(model, text_output=text, token_ids=list(ids), finish_reason=end, prompt_tokens=3, completion_tokens=len(ids))  # fmt: skip


def read_inputs(request) -> dict:
    """The inputs of a request by name."""
    kinds = {"BOOL": np.bool_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
    found = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            texts, place = [], 0
            while place < len(raw):
                end = place + 4 + int.from_bytes(raw[place : place + 4], "little")
                texts.append(raw[place + 4 : end].decode())
                place = end
            found[tensor.name] = texts
        else:
            found[tensor.name] = np.frombuffer(raw, kinds[tensor.datatype]).tolist()
        assert len(found[tensor.name]) == int(np.prod(list(tensor.shape)))
    return found
