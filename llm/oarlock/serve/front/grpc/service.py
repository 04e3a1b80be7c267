"""KServe's gRPC for clients: the calls of Triton that ask about models or ask them, and none that changes the server.

Messages go through as bytes. A request is parsed once, to be checked; each request of a stream is a call of its own to
Triton, so that it is known when it ends.
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
from oarlock.serve.front.admission import Admission, Refused, client_of
from oarlock.serve.front.check_request import UnknownModel, check_infer_request
from oarlock.serve.front.grpc.http2_frames import TOO_LONG
from oarlock.serve.front.grpc.stream import Stream
from oarlock.serve.front.keys import Keys
from oarlock.serve.front.metrics import FrontCounts
from oarlock.serve.front.model_forms import ModelForm, ModelForms
from oarlock.serve.triton.client import TritonClient, TritonFailure

# grpc.health.v1.HealthCheckResponse: status SERVING, and NOT_SERVING.
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
ASKED = {
    "ServerLive": service_pb2.ServerLiveRequest,
    "ServerReady": service_pb2.ServerReadyRequest,
    "ServerMetadata": service_pb2.ServerMetadataRequest,
    "ModelReady": service_pb2.ModelReadyRequest,
    "ModelMetadata": service_pb2.ModelMetadataRequest,
    "ModelConfig": service_pb2.ModelConfigRequest,
    "ModelStatistics": service_pb2.ModelStatisticsRequest,
}
# What probes are told while Triton is started: not ready, and no reason to start this server again.
_WHILE_AWAY: dict[str, Message] = {
    "ServerLive": service_pb2.ServerLiveResponse(live=True),
    "ServerReady": service_pb2.ServerReadyResponse(ready=False),
    "ModelReady": service_pb2.ModelReadyResponse(ready=False),
}
_WITHOUT_KEY = ("ServerLive", "ServerReady", "Check")  # for probes
_ASK_SECONDS, _MORE_SECONDS = 30.0, 30.0
_IN_A_THREAD = 65536  # bytes of a request whose check would hold up the others
_MAX_NAME, _MAX_MESSAGE = 256, 4096  # characters
_MORE_CALLS = 64  # of a client, beside its requests: probes, streams between two requests

_M = TypeVar("_M", bound=Message)

Context = Any  # grpc.aio.ServicerContext of bytes
Behavior = Callable[[Context], Awaitable["bytes | None"]]  # the answer of a call that has one


class GrpcService:
    """What the calls do."""

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
        self._calls = Admission(config.front.max_connections, config.max_open_per_client + _MORE_CALLS, "calls")

    def guarded(self, name: str, behavior: Behavior) -> Callable[..., Awaitable[bytes | None]]:
        """With the key and the number of calls looked at first, and with errors as a status."""

        async def handle(_: Any, context: Context) -> bytes | None:
            code = grpc.StatusCode.OK
            try:
                return await self._in_place(name, behavior, context)
            except TritonFailure as error:
                code = error.code
                await context.abort(code, str(error)[:_MAX_MESSAGE])
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except grpc.aio.InternalError:  # of reading or writing: the client went away meanwhile
                code = grpc.StatusCode.CANCELLED
            except Exception as error:
                code = grpc.StatusCode.INTERNAL
                traceback.print_exc()
                await context.abort(code, f"the server failed: {type(error).__name__}")
            finally:
                self._counts.add_request("grpc", name, code.name)
            return b""

        return handle

    async def _in_place(self, name: str, behavior: Behavior, context: Context) -> bytes | None:
        if name not in _WITHOUT_KEY and not self._keys.accept(_metadata(context, "authorization")):
            self._counts.add_refusal("grpc", "key")
            raise TritonFailure(
                grpc.StatusCode.UNAUTHENTICATED, "the API key is missing or wrong (metadata authorization: Bearer KEY)"
            )
        client = self._client(context, with_key=name not in _WITHOUT_KEY)
        try:
            self._calls.take(client)
        except Refused as error:
            self._counts.add_refusal("grpc", "full")
            raise TritonFailure(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        try:
            return await behavior(context)
        finally:
            self._calls.leave(client)

    # the calls

    async def health(self, context: Context) -> bytes:
        """Whether Triton can be asked, in the standard form of probes."""
        await self._read(context)
        return _SERVING if await self._triton.is_server_ready() else _NOT_SERVING

    def asker(self, name: str) -> Behavior:
        """A call that asks Triton about the server or a model."""

        async def ask(context: Context) -> bytes:
            data = await self._read(context)
            message = _parsed(ASKED[name], data)
            for field, value in message.ListFields():
                if len(value) > _MAX_NAME or not value.isprintable():
                    raise TritonFailure(
                        grpc.StatusCode.INVALID_ARGUMENT, f"{field.name}: at most {_MAX_NAME} printable characters"
                    )
            try:
                return bytes(await self._triton.call(name, _canonical(message, data), timeout=_ASK_SECONDS))
            except TritonFailure as error:
                if name not in _WHILE_AWAY or error.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return bytes(_WHILE_AWAY[name].SerializeToString())

        return ask

    async def infer(self, context: Context) -> bytes:
        """One request, one response."""
        data = await self._read(context)
        message = _parsed(service_pb2.ModelInferRequest, data)
        await self._check(message, len(data))
        async with self._place(self._client(context)):
            seconds = self._config.engine.timeout + _MORE_SECONDS
            return bytes(await self._triton.call("ModelInfer", _canonical(message, data), timeout=seconds))

    async def infer_stream(self, context: Context) -> None:
        """Any number of requests, and their responses as they come; errors are messages."""
        stream, client = Stream(context.write), self._client(context)
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                self._check_size(data)
                message = service_pb2.ModelInferRequest()
                try:
                    message = _parsed(service_pb2.ModelInferRequest, data)
                    form = await self._check(message, len(data))
                except TritonFailure as error:
                    await stream.write(_error_message(error, message.id))
                    continue
                answers = self._answers(_canonical(message, data), message.id, client)
                stream.add(answers, in_order=not form.decoupled)
                # A client that does not read is not read either.
                await stream.wait_below(self._config.max_open_per_client + 1)
            await stream.wait_below(1)
        finally:
            await stream.cancel()

    async def _answers(self, data: bytes, request_id: str, client: str) -> AsyncGenerator[bytes, None]:
        """To one request of a stream."""
        try:
            async with self._place(client):
                seconds = self._config.engine.timeout + _MORE_SECONDS
                async with contextlib.aclosing(self._triton.stream(data, seconds)) as answers:
                    async for answer in answers:
                        yield answer
        except TritonFailure as error:
            yield _error_message(error, request_id)

    # helpers

    async def _read(self, context: Context) -> bytes:
        """The request of a call that has one."""
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
        """Refuse what was put in the place of a message that is too long."""
        if data == TOO_LONG:
            self._counts.add_refusal("grpc", "size")
            most = self._config.engine.max_body
            raise TritonFailure(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"the request is larger than the {most:,} bytes that one may have"
            )

    async def _check(self, message: service_pb2.ModelInferRequest, size: int) -> ModelForm:
        """The form of the model that is asked."""
        limits = await self._forms.limits()
        try:
            if size > _IN_A_THREAD:
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
    async def _place(self, client: str) -> AsyncIterator[None]:
        try:
            self._admission.take(client)
        except Refused as error:
            self._counts.add_refusal("grpc", "full")
            raise TritonFailure(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        try:
            yield
        finally:
            self._admission.leave(client)

    def _client(self, context: Context, with_key: bool = True) -> str:
        """Whose a call is, see client_of()."""
        key = _metadata(context, "authorization") if self._keys and with_key else None
        address = _metadata(context, self._client_header)
        return client_of(str(address), key.encode() if isinstance(key, str) else key)


def _metadata(context: Context, name: str) -> str | bytes | None:
    return next((value for key, value in context.invocation_metadata() or () if key == name), None)


def _parsed(kind: Callable[[], _M], data: bytes) -> _M:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        name = message.DESCRIPTOR.name
        raise TritonFailure(grpc.StatusCode.INVALID_ARGUMENT, f"the request is not a valid {name}") from error
    return message


def _canonical(message: Message, data: bytes) -> bytes:
    """What was checked, and no more: the bytes as they came, unless they hold fields that are not known here."""
    message.DiscardUnknownFields()
    return data if message.ByteSize() == len(data) else message.SerializeToString()


def _error_message(error: TritonFailure, request_id: str) -> bytes:
    wrong = service_pb2.ModelStreamInferResponse(error_message=str(error)[:_MAX_MESSAGE])
    wrong.infer_response.id = request_id[:_MAX_NAME]
    return bytes(wrong.SerializeToString())
