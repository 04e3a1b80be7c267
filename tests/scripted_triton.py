"""A Triton on a Unix socket that reads the configurations of its models and answers as a test scripts it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from oarlock.serve.config import EngineConfig, FrontConfig, ServeConfig, TritonConfig
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.grpc.server import make_grpc_server
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.metrics import FrontCounts
from oarlock.serve.front.model_forms import ModelForm, RequestLimits
from oarlock.serve.triton.client import TritonClient
from oarlock.triton_repository.config_pbtxt import make_template_config
from serving import free_ports

MODELS = ("oarlock", "oarlock_infer", "oarlock_json")
CONFIGS = {name: make_template_config(name) for name in MODELS}
GUARD_S = 60  # only guards against hanging


def limits(max_body=100_000):
    return RequestLimits({name: ModelForm.from_config(config) for name, config in CONFIGS.items()}, max_body)


def question(model="oarlock_infer", text=b"x", **more):
    """A request with a text, and further tensors as (datatype, shape, bytes)."""
    request = service_pb2.ModelInferRequest(model_name=model)
    name = "IN" if model == "oarlock_json" else "text_input"
    for key, (kind, shape, raw) in {name: ("BYTES", [1], len(text).to_bytes(4, "little") + text), **more}.items():
        request.inputs.add(name=key, datatype=kind, shape=shape)
        request.raw_input_contents.append(raw)
    return request


class ScriptedTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers each request with its text; a stream has `pieces` answers, which wait for `gate`."""

    def __init__(self):
        self.seen = []
        self.cancelled = 0
        self.pieces = 3
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails = lambda request: ""

    async def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    async def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerMetadata(self, request, context):
        return service_pb2.ServerMetadataResponse(name="triton", version="0")

    async def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name in CONFIGS)

    async def ModelMetadata(self, request, context):
        return service_pb2.ModelMetadataResponse(name=request.name, platform="python")

    async def ModelStatistics(self, request, context):
        return service_pb2.ModelStatisticsResponse()

    async def ModelConfig(self, request, context):
        if request.name not in CONFIGS:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return service_pb2.ModelConfigResponse(config=CONFIGS[request.name])

    async def ModelInfer(self, request, context):
        self.seen.append(request)
        if wrong := self.fails(request):
            await context.abort(grpc.StatusCode.INTERNAL, wrong)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self._answer(request, 0)

    async def ModelStreamInfer(self, requests, context):
        try:
            async for request in requests:
                self.seen.append(request)
                if wrong := self.fails(request):
                    yield service_pb2.ModelStreamInferResponse(error_message=wrong)
                    continue
                for i in range(self.pieces):
                    if i:
                        await self.gate.wait()
                    answer = service_pb2.ModelStreamInferResponse(infer_response=self._answer(request, i))
                    answer.infer_response.parameters["triton_final_response"].bool_param = i == self.pieces - 1
                    yield answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _answer(self, request, i):
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        answer.outputs.add(name="text_output", datatype="BYTES", shape=[1])
        raw = request.raw_input_contents[0] if request.raw_input_contents else b""
        text = raw[4:] + str(i).encode()
        answer.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
        return answer


async def start_triton(path: Path, triton: ScriptedTriton):
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    assert server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server


@contextlib.asynccontextmanager
async def front_of_triton(tmp_path: Path, keys=(), max_body=100_000, timeout=600.0, **options):
    """(stub of the front, its Triton, its counts, the channel with its address)."""
    triton = ScriptedTriton()
    config = ServeConfig(
        EngineConfig(max_body=max_body, timeout=timeout), TritonConfig(models=MODELS, run=str(tmp_path)),
        FrontConfig(**{"grpc_port": free_ports(1)[0], "body_seconds": 60.0, **options}),
    )  # fmt: skip
    behind = await start_triton(config.triton.grpc_socket, triton)
    upstream, counts = TritonClient(f"unix:{config.triton.grpc_socket}"), FrontCounts()
    admission = Admission(config.max_open, config.max_open_per_client)
    server = make_grpc_server(config, upstream, Keys(keys), admission, counts)
    await server.start()
    triton.server = behind
    address = f"127.0.0.1:{config.front.grpc_port}"
    channel = grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
    channel.address = address
    try:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel), triton, counts, channel
    finally:
        await channel.close()
        await server.stop(0)
        await upstream.close()
        await behind.stop(0)
    assert admission.num_open == 0
