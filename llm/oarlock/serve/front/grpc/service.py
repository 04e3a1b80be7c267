"""KServe's gRPC for clients: Triton's calls for inference and metadata, and none that changes the server.

Messages are passed on as bytes, and parsed once to be checked. Each request of a stream is a call of its own to Triton,
so that its end is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2

from oarlock.errors import RequestRefused
from oarlock.serve.config import ServeConfig
from oarlock.serve.front.admission import Admission, AdmissionRefused, identify_client
from oarlock.serve.front.check_request import UnknownModel, check_infer_request
from oarlock.serve.front.grpc.http2_frames import TOO_LONG
from oarlock.serve.front.grpc.stream import Stream
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.metrics import FrontCounts
from oarlock.serve.front.model_forms import ModelForm, ModelForms
from oarlock.serve.triton.client import TritonClient, TritonFailure

# grpc.health.v1.HealthCheckResponse: status SERVING, and NOT_SERVING.
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
QUERIES = {
    "ServerLive": service_pb2.ServerLiveRequest,
    "ServerReady": service_pb2.ServerReadyRequest,
    "ServerMetadata": service_pb2.ServerMetadataRequest,
    "ModelReady": service_pb2.ModelReadyRequest,
    "ModelMetadata": service_pb2.ModelMetadataRequest,
    "ModelConfig": service_pb2.ModelConfigRequest,
    "ModelStatistics": service_pb2.ModelStatisticsRequest,
}
# Answers to probes while Triton starts: not ready, but no reason to restart this server.
_WHILE_AWAY: dict[str, Message] = {
    "ServerLive": service_pb2.ServerLiveResponse(live=True),
    "ServerReady": service_pb2.ServerReadyResponse(ready=False),
    "ModelReady": service_pb2.ModelReadyResponse(ready=False),
}
_WITHOUT_KEY = ("ServerLive", "ServerReady", "Check")  # for probes
_CALL_SECONDS, _EXTRA_SECONDS = 30.0, 30.0
_LARGE = 65536  # bytes of a request whose check would delay others
_MAX_NAME, _MAX_MESSAGE = 256, 4096  # characters
_EXTRA_CALLS = 64  # of a client, besides its requests: probes, streams between two requests

_M = TypeVar("_M", bound=Message)

Context = Any  # grpc.aio.ServicerContext of bytes
Behavior = Callable[[Context], Awaitable["bytes | None"]]  # returns the answer of a call that has one


class GrpcService:
    """The calls of the port."""

    def __init__(
        self,
        config: ServeConfig,
        triton: TritonClient,
        keys: Keys,
        admission: Admission,
        counts: FrontCounts,
        client_header: str,
    ) -> None:
        self._config, self._triton, self._keys = config, triton, keys
        self._admission, self._counts = admission, counts
        self._client_header = client_header
        self._forms = ModelForms(triton, config.triton.models, config.engine.max_body)
        self._calls = Admission(config.front.max_connections, config.max_open_per_client + _EXTRA_CALLS, "calls")

    def guard(self, name: str, behavior: Behavior) -> Callable[..., Awaitable[bytes | None]]:
        """Check key and number of calls before a call, and turn errors into a status."""

        async def handle(_: Any, context: Context) -> bytes | None:
            code = grpc.StatusCode.OK
            try:
                return await self._admit(name, behavior, context)
            except TritonFailure as error:
                code = error.code
                await context.abort(code, str(error)[:_MAX_MESSAGE])
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except grpc.aio.InternalError:  # of reading or writing: the client has disconnected
                code = grpc.StatusCode.CANCELLED
            except Exception as error:
                code = grpc.StatusCode.INTERNAL
                traceback.print_exc()
                await context.abort(code, f"the server failed: {type(error).__name__}")
            finally:
                self._counts.add_request("grpc", name, code.name)
            return b""

        return handle

    async def _admit(self, name: str, behavior: Behavior, context: Context) -> bytes | None:
        if name not in _WITHOUT_KEY and not self._keys.accept(_find_metadata(context, "authorization")):
            self._counts.add_refusal("grpc", "key")
            raise TritonFailure(
                grpc.StatusCode.UNAUTHENTICATED, "the API key is missing or wrong (metadata authorization: Bearer KEY)"
            )
        client = self._identify_client(context, with_key=name not in _WITHOUT_KEY)
        try:
            self._calls.acquire(client)
        except AdmissionRefused as error:
            self._counts.add_refusal("grpc", "full")
            raise TritonFailure(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        try:
            return await behavior(context)
        finally:
            self._calls.release(client)

    # the calls

    async def check_health(self, context: Context) -> bytes:
        """Answer the standard probe: whether Triton is ready."""
        await self._read(context)
        return _SERVING if await self._triton.is_server_ready() else _NOT_SERVING

    def make_query(self, name: str) -> Behavior:
        """Make a call that asks Triton about the server or a model."""

        async def query(context: Context) -> bytes:
            data = await self._read(context)
            message = _parse(QUERIES[name], data)
            for field, value in message.ListFields():
                if len(value) > _MAX_NAME or not value.isprintable():
                    raise TritonFailure(
                        grpc.StatusCode.INVALID_ARGUMENT, f"{field.name}: at most {_MAX_NAME} printable characters"
                    )
            try:
                return bytes(await self._triton.call(name, _drop_unknown_fields(message, data), timeout=_CALL_SECONDS))
            except TritonFailure as error:
                if name not in _WHILE_AWAY or error.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return bytes(_WHILE_AWAY[name].SerializeToString())

        return query

    async def infer(self, context: Context) -> bytes:
        """Answer one request with one response."""
        data = await self._read(context)
        message = _parse(service_pb2.ModelInferRequest, data)
        await self._check(message, len(data))
        async with self._hold_slot(self._identify_client(context)):
            seconds = self._config.engine.timeout + _EXTRA_SECONDS
            return bytes(await self._triton.call("ModelInfer", _drop_unknown_fields(message, data), timeout=seconds))

    async def infer_stream(self, context: Context) -> None:
        """Answer any number of requests, with responses as they come. Errors are messages."""
        stream, client = Stream(context.write), self._identify_client(context)
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                self._check_size(data)
                message = service_pb2.ModelInferRequest()
                try:
                    message = _parse(service_pb2.ModelInferRequest, data)
                    form = await self._check(message, len(data))
                except TritonFailure as error:
                    await stream.write(_make_error(error, message.id))
                    continue
                answers = self._stream_answers(_drop_unknown_fields(message, data), message.id, client)
                stream.add(answers, in_order=not form.decoupled)
                # Nothing is read from a client that does not read its answers.
                await stream.wait_below(self._config.max_open_per_client + 1)
            await stream.wait_below(1)
        finally:
            await stream.cancel()

    async def _stream_answers(self, data: bytes, request_id: str, client: str) -> AsyncGenerator[bytes, None]:
        try:
            async with self._hold_slot(client):
                seconds = self._config.engine.timeout + _EXTRA_SECONDS
                async with contextlib.aclosing(self._triton.stream(data, seconds)) as answers:
                    async for answer in answers:
                        yield answer
        except TritonFailure as error:
            yield _make_error(error, request_id)

    # helpers

    async def _read(self, context: Context) -> bytes:
        """Read the request of a call that has one."""
        try:
            data = await asyncio.wait_for(context.read(), self._config.front.body_seconds)
        except asyncio.TimeoutError as error:
            self._counts.add_refusal("grpc", "slow")
            raise TritonFailure(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"the request did not arrive within {self._config.front.body_seconds:g} seconds",
            ) from error
        if data is grpc.aio.EOF:
            raise TritonFailure(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")
        self._check_size(data)
        return bytes(data)

    def _check_size(self, data: bytes) -> None:
        """Refuse a message that the gate has replaced because it is too long."""
        if data == TOO_LONG:
            self._counts.add_refusal("grpc", "size")
            most = self._config.engine.max_body
            raise TritonFailure(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"the request is larger than the {most:,} bytes that one may have"
            )

    async def _check(self, message: service_pb2.ModelInferRequest, size: int) -> ModelForm:
        """Check a request, and return the form of its model."""
        limits = await self._forms.get_limits()
        try:
            if size > _LARGE:
                await asyncio.to_thread(check_infer_request, message, limits)
            else:
                check_infer_request(message, limits)
        except UnknownModel as error:
            self._counts.add_refusal("grpc", "model")
            raise TritonFailure(grpc.StatusCode.NOT_FOUND, str(error)) from error
        except RequestRefused as error:
            self._counts.add_refusal("grpc", "request")
            raise TritonFailure(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        return limits.models[message.model_name]

    @contextlib.asynccontextmanager
    async def _hold_slot(self, client: str) -> AsyncIterator[None]:
        try:
            self._admission.acquire(client)
        except AdmissionRefused as error:
            self._counts.add_refusal("grpc", "full")
            raise TritonFailure(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        try:
            yield
        finally:
            self._admission.release(client)

    def _identify_client(self, context: Context, with_key: bool = True) -> str:
        key = _find_metadata(context, "authorization") if self._keys and with_key else None
        address = _find_metadata(context, self._client_header)
        return identify_client(str(address), key.encode() if isinstance(key, str) else key)


def _find_metadata(context: Context, name: str) -> str | bytes | None:
    return next((value for key, value in context.invocation_metadata() or () if key == name), None)


def _parse(kind: Callable[[], _M], data: bytes) -> _M:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        name = message.DESCRIPTOR.name
        raise TritonFailure(grpc.StatusCode.INVALID_ARGUMENT, f"the request is not a valid {name}") from error
    return message


def _drop_unknown_fields(message: Message, data: bytes) -> bytes:
    """The bytes of a checked message without unknown fields: as they came, if there are none."""
    message.DiscardUnknownFields()
    return data if message.ByteSize() == len(data) else message.SerializeToString()


def _make_error(error: TritonFailure, request_id: str) -> bytes:
    wrong = service_pb2.ModelStreamInferResponse(error_message=str(error)[:_MAX_MESSAGE])
    wrong.infer_response.id = request_id[:_MAX_NAME]
    return bytes(wrong.SerializeToString())
