"""Asks a Triton server's streaming model, over gRPC; for asyncio."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from oarlock.serve.front.upstream import Upstream
from oarlock.serve.triton.failure import AWAY, TritonFailure, is_of_a_dead_process
from oarlock.serve.triton.fields import DEFAULT_TOKENS, FIELDS, OUTPUTS, RELAYED, make_tensor, split_code

# A stream's errors are messages without a status. (The header triton_grpc_error would end it with one, but Triton 24.10
# crashes now and then when it does.)
_CODES = {
    "INVALID_ARG": grpc.StatusCode.INVALID_ARGUMENT,
    "UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "CANCELLED": grpc.StatusCode.CANCELLED,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True)
class Part:
    """Of an answer; the last one has a finish_reason."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class TritonClient:
    """The streaming model, asked over one connection."""

    def __init__(self, upstream: Upstream, model: str) -> None:
        """Of a model behind `upstream`, which stays its owner's."""
        self._upstream, self._model = upstream, model

    async def is_ready(self) -> bool:
        """Whether the model can be asked."""
        return await self._upstream.is_ready(self._model)

    async def adapters(self) -> list[str]:
        """Names of the adapters beside the model.

        Raises:
            TritonFailure: when the model is not there.
        """
        request = service_pb2.ModelConfigRequest(name=self._model)
        answer = await self._upstream.ask("ModelConfig", request, timeout=5)
        return list(answer.config.parameters["adapters"].string_value.split())

    async def ask(self, values: Mapping[str, Any], default_tokens: int | None = None) -> AsyncGenerator[Part, None]:
        """The answer as it comes. Leaving the iteration early (aclose, cancellation) cancels it in Triton.

        Args:
            values: of the model's inputs (triton_fields.FIELDS), without "stream".
            default_tokens: of an answer without max_tokens; None for as many as there is room for.

        Raises:
            TritonFailure: when it is refused, or fails.
        """
        request = service_pb2.ModelInferRequest(model_name=self._model)
        request.parameters[RELAYED].string_param = uuid.uuid4().hex
        if default_tokens is not None:
            request.parameters[DEFAULT_TOKENS].int64_param = default_tokens
        for name, value in {**values, "stream": True}.items():
            _add(request, name, value)
        for output in OUTPUTS:
            request.outputs.add().name = output
        async with contextlib.aclosing(self._upstream.stream(request)) as answers:
            async for answer in answers:
                if answer.error_message:
                    raise stream_failure(answer.error_message)
                yield _part(answer.infer_response)


def _add(request: service_pb2.ModelInferRequest, name: str, value: Any) -> None:
    _, is_list = FIELDS[name]
    values = make_tensor(name, value if is_list else [value])
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = name, np_to_triton_dtype(values.dtype)
    tensor.shape.extend(values.shape)
    is_text = values.dtype == object
    request.raw_input_contents.append(serialize_byte_tensor(values).item() if is_text else values.tobytes())


def stream_failure(text: str) -> TritonFailure:
    """What an error message in a stream says."""
    code, message = split_code(text)
    if code:
        return TritonFailure(_CODES[code], message)
    if is_of_a_dead_process(text):
        return TritonFailure(grpc.StatusCode.UNAVAILABLE, AWAY)
    is_away = "unknown model" in text or "not ready" in text or "unavailable" in text.lower()
    return TritonFailure(grpc.StatusCode.UNAVAILABLE if is_away else grpc.StatusCode.INTERNAL, text)


def _part(response: service_pb2.ModelInferResponse) -> Part:
    raw = {output.name: content for output, content in zip(response.outputs, response.raw_output_contents, strict=True)}
    return Part(
        raw["text_output"][4:].decode("utf-8"),
        raw["finish_reason"][4:].decode("utf-8"),
        int.from_bytes(raw["prompt_tokens"], "little"),
        int.from_bytes(raw["completion_tokens"], "little"),
    )
