"""Triton's gRPC on a Unix socket, for asyncio. Triton may end and be started again meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from oarlock.serve.triton.failure import AWAY, TritonFailure, is_of_a_dead_process

SERVICE = "inference.GRPCInferenceService"
_MAX_MESSAGE = 2**31 - 1  # of Triton's answers: what it is asked was checked
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    # By default a connection that failed is tried again after up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),  # a request is asked once
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
# How gRPC's core writes of a connection that can't be made, or ended.
_OF_THE_CONNECTION = ("connect", "unix:", "Socket closed", "GOAWAY", "recvmsg", "sendmsg", "Cancelling all calls")
_LOOK_SECONDS = 5.0


class Upstream:
    """One connection for all requests.

    Attributes:
        stub: of Triton's service with its messages. Its calls raise grpc.RpcError; failure() makes a TritonFailure of
            that.
    """

    def __init__(self, address: str) -> None:
        """To unix:PATH, or HOST:PORT."""
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # A stream of one request: on the wire the same as any, and less work than a call that may write more.
        path = f"/{SERVICE}/ModelStreamInfer"
        self._stream_of_bytes: Callable[..., Any] = self._channel.unary_stream(path)
        self._stream_of_messages: Callable[..., Any] = self._channel.unary_stream(
            path,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    async def close(self) -> None:
        """The connection."""
        await self._channel.close()

    async def available(self) -> bool:
        """Whether Triton answers and has its models."""
        with contextlib.suppress(grpc.RpcError):
            answer = await self.stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=_LOOK_SECONDS)
            return bool(answer.ready)
        return False

    async def is_ready(self, model: str) -> bool:
        """Whether a model can be asked."""
        with contextlib.suppress(grpc.RpcError):
            answer = await self.stub.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=_LOOK_SECONDS)
            return bool(answer.ready)
        return False

    async def ask(self, method: str, request: Any, timeout: float | None = None) -> Any:
        """A call with one answer, as ask("ModelInfer", request).

        Args:
            request: a message, or one that is serialized; the answer is of the same kind.
            timeout: in seconds.

        Raises:
            TritonFailure: with the code of Triton's; UNAVAILABLE while it is away.
        """
        is_raw = isinstance(request, bytes)
        call = self._channel.unary_unary(f"/{SERVICE}/{method}") if is_raw else getattr(self.stub, method)
        try:
            return await call(request, timeout=timeout)
        except grpc.RpcError as error:
            raise failure(error) from error

    async def stream(self, request: Any, timeout: float | None = None) -> AsyncGenerator[Any, None]:
        """The answers to one request of ModelStreamInfer. Leaving it early (aclose, cancellation) cancels it in Triton.

        Args:
            request: a message, or one that is serialized; the answers are of the same kind.
            timeout: in seconds, for all of them.

        Raises:
            TritonFailure: when Triton is away, or ends meanwhile. What it refuses comes as an answer.
        """
        call = (self._stream_of_bytes if isinstance(request, bytes) else self._stream_of_messages)(
            request, timeout=timeout
        )
        try:
            async for answer in call:
                yield answer
        except grpc.RpcError as error:
            raise failure(error) from error
        finally:
            if not call.done():
                call.cancel()


def failure(error: grpc.RpcError) -> TritonFailure:
    """In words for a client: what gRPC says of connections and paths is not its business."""
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.UNAVAILABLE and _is_of_the_connection(details):
        return TritonFailure(code, AWAY)
    if is_of_a_dead_process(details):
        return TritonFailure(grpc.StatusCode.UNAVAILABLE, AWAY)
    return TritonFailure(code, details)


def _is_of_the_connection(details: str) -> bool:
    return not details or any(words in details for words in _OF_THE_CONNECTION)
