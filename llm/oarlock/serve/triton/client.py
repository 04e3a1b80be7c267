"""Client of Triton's gRPC on a Unix socket, for asyncio. Triton may end and be restarted meanwhile."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from oarlock.serve.request import FinishReason, GenerationRequest, TokenChunk
from oarlock.serve.triton.fields import DEFAULT_TOKENS, RELAYED, split_code, write_request
from oarlock.triton_repository.inputs import OUTPUTS

SERVICE = "inference.GRPCInferenceService"
AWAY = "the model is being started; try again soon"
_MAX_MESSAGE = 2**31 - 1  # of Triton's answers; requests have been checked
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    # By default a connection that failed is tried again after up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),  # a request is sent once
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
# How gRPC's core words a connection that can't be made, or has ended.
_OF_THE_CONNECTION = ("connect", "unix:", "Socket closed", "GOAWAY", "recvmsg", "sendmsg", "Cancelling all calls")
_PROBE_SECONDS = 5.0
# A stream's errors are messages without a status. (The header triton_grpc_error would end it with one, but Triton 24.10
# crashes now and then when it does.)
_CODES = {
    "INVALID_ARG": grpc.StatusCode.INVALID_ARGUMENT,
    "UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "CANCELLED": grpc.StatusCode.CANCELLED,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}


class TritonFailure(Exception):
    """Triton refused a request, could not answer it, or is away.

    Attributes:
        code: of gRPC.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class TritonClient:
    """One connection for all requests."""

    def __init__(self, address: str) -> None:
        """Connect to unix:PATH, or HOST:PORT."""
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # A stream of one request: on the wire the same as any, and less work than a call that may write more.
        path = f"/{SERVICE}/ModelStreamInfer"
        self._stream_of_bytes: Callable[..., Any] = self._channel.unary_stream(path)
        self._stream_of_messages: Callable[..., Any] = self._channel.unary_stream(
            path,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def is_server_ready(self) -> bool:
        with contextlib.suppress(grpc.RpcError):
            answer = await self._stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=_PROBE_SECONDS)
            return bool(answer.ready)
        return False

    async def is_model_ready(self, model: str) -> bool:
        with contextlib.suppress(grpc.RpcError):
            answer = await self._stub.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=_PROBE_SECONDS)
            return bool(answer.ready)
        return False

    async def call(self, method: str, request: Any, timeout: float | None = None) -> Any:
        """A call with one answer, such as call("ModelInfer", request).

        Args:
            request: a message, or serialized bytes; the answer is of the same kind.
            timeout: in seconds.

        Raises:
            TritonFailure: with Triton's code; UNAVAILABLE while it is away.
        """
        is_raw = isinstance(request, bytes)
        call = self._channel.unary_unary(f"/{SERVICE}/{method}") if is_raw else getattr(self._stub, method)
        try:
            return await call(request, timeout=timeout)
        except grpc.RpcError as error:
            raise to_failure(error) from error

    async def stream(self, request: Any, timeout: float | None = None) -> AsyncGenerator[Any, None]:
        """The answers to one request of ModelStreamInfer. Closing the generator cancels the request in Triton.

        Args:
            request: a message, or serialized bytes; the answers are of the same kind.
            timeout: in seconds, for all of them.

        Raises:
            TritonFailure: when Triton is away, or ends meanwhile. What it refuses comes as an answer.
        """
        open_stream = self._stream_of_bytes if isinstance(request, bytes) else self._stream_of_messages
        call = open_stream(request, timeout=timeout)
        try:
            async for answer in call:
                yield answer
        except grpc.RpcError as error:
            raise to_failure(error) from error
        finally:
            if not call.done():
                call.cancel()

    async def generate(self, model: str, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """The answer of a streaming model, chunk by chunk. Closing the generator cancels the request in Triton.

        Raises:
            TritonFailure: when the request is refused, or fails.
        """
        message = service_pb2.ModelInferRequest(model_name=model)
        message.parameters[RELAYED].string_param = uuid.uuid4().hex  # so that errors have a code
        if request.sampling.default_tokens is not None:
            message.parameters[DEFAULT_TOKENS].int64_param = request.sampling.default_tokens
        for name, values in write_request(request).items():
            message.inputs.add(name=name, datatype=np_to_triton_dtype(values.dtype), shape=values.shape)
            is_text = values.dtype == object
            message.raw_input_contents.append(serialize_byte_tensor(values).item() if is_text else values.tobytes())
        for name in OUTPUTS:
            message.outputs.add(name=name)
        async with contextlib.aclosing(self.stream(message)) as answers:
            async for answer in answers:
                if answer.error_message:
                    raise to_stream_failure(answer.error_message)
                response = answer.infer_response
                contents = zip(response.outputs, response.raw_output_contents, strict=True)
                raw = {output.name: content for output, content in contents}
                yield TokenChunk(
                    text=raw["text_output"][4:].decode("utf-8"),
                    token_ids=tuple(np.frombuffer(raw["token_ids"], "<i4").tolist()),
                    finish_reason=cast(FinishReason, raw["finish_reason"][4:].decode("utf-8")) or None,
                    prompt_tokens=int.from_bytes(raw["prompt_tokens"], "little"),
                    completion_tokens=int.from_bytes(raw["completion_tokens"], "little"),
                )

    async def list_adapters(self, model: str) -> list[str]:
        """List the LoRA adapters of a streaming model.

        Raises:
            TritonFailure: when the model is missing, or Triton away.
        """
        answer = await self.call("ModelConfig", service_pb2.ModelConfigRequest(name=model), timeout=_PROBE_SECONDS)
        return list(answer.config.parameters["adapters"].string_value.split())


def to_failure(error: grpc.RpcError) -> TritonFailure:
    """Make the failure for a client, without connections and paths."""
    code, details = error.code(), error.details() or ""
    is_of_the_connection = not details or any(words in details for words in _OF_THE_CONNECTION)
    if code == grpc.StatusCode.UNAVAILABLE and is_of_the_connection:
        return TritonFailure(code, AWAY)
    if _is_of_a_dead_process(details):
        return TritonFailure(grpc.StatusCode.UNAVAILABLE, AWAY)
    return TritonFailure(code, details)


def to_stream_failure(text: str) -> TritonFailure:
    """Make the failure that an error message in a stream reports."""
    code, message = split_code(text)
    if code:
        return TritonFailure(_CODES[code], message)
    if _is_of_a_dead_process(text):
        return TritonFailure(grpc.StatusCode.UNAVAILABLE, AWAY)
    is_away = "unknown model" in text or "not ready" in text or "unavailable" in text.lower()
    return TritonFailure(grpc.StatusCode.UNAVAILABLE if is_away else grpc.StatusCode.INTERNAL, text)


def _is_of_a_dead_process(text: str) -> bool:
    # The server restarts the process.
    return "stub process" in text.lower()
