"""KServe's REST and Triton's generate extension, as in Triton 24.10. Each request becomes a gRPC request to Triton.

There are no other routes: none that load models, share memory, trace or change the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import grpc
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tritonclient.grpc import service_pb2

from oarlock.errors import RequestRefused
from oarlock.serve.config import ServeConfig
from oarlock.serve.front.check_request import UnknownModel, check_infer_request
from oarlock.serve.front.http.disconnect import EndsWithClient
from oarlock.serve.front.http.heads import HEADER_LENGTH
from oarlock.serve.front.http.json_body import read_object
from oarlock.serve.front.http.refusal import HttpRefusal, quote
from oarlock.serve.front.model_forms import ModelForm, ModelForms
from oarlock.serve.front.rest.generate import read_generate, write_generate
from oarlock.serve.front.rest.infer import InferRequest, read_infer, to_json, unpack, write_infer
from oarlock.serve.front.rest.metadata import read_model_metadata, read_server_metadata, to_dict
from oarlock.serve.triton.client import TritonClient, TritonFailure, to_stream_failure
from oarlock.serve.triton.fields import RELAYED

HEALTH_PATHS = ("/v2/health/live", "/v2/health/ready")
_MODEL = re.compile(
    r"/v2/models/([^/]+)(?:/versions/([0-9]{1,18}))?(?:/(infer|generate|generate_stream|ready|config|stats))?"
)
_JSON, _EVENTS, _BYTES = "application/json", "text/event-stream; charset=utf-8", "application/octet-stream"
_STATUS = {  # as in Triton's REST
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.ALREADY_EXISTS: 400,
    grpc.StatusCode.CANCELLED: 503,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 503,
}
_NOT_READY = "Model version not ready"
_NOT_ONE = (
    "generate expects model to produce exactly 1 response, "
    "use generate stream for model that generates various number of responses"
)
_CALL_SECONDS, _EXTRA_SECONDS = 30.0, 30.0
_LARGE = 65536  # bytes of a body
_T = TypeVar("_T")


def make_rest_app(config: ServeConfig, triton: TritonClient) -> ASGIApp:
    """Make the application of the REST port. It must be behind a Guard, which passes on complete bodies."""
    return _Rest(config, triton)


def make_rest_error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make an error as Triton writes it."""
    headers = {**(headers or {}), **({"Retry-After": "1"} if status in (429, 503) else {})}
    return Response(to_json({"error": message[:4096]}), status, headers, _JSON)


def to_status(code: grpc.StatusCode) -> int:
    """The HTTP status for a gRPC code."""
    return _STATUS.get(code, 500)


class _Rest:
    """The ASGI application."""

    def __init__(self, config: ServeConfig, triton: TritonClient) -> None:
        self._config, self._triton = config, triton
        self._forms = ModelForms(triton, config.triton.models, config.engine.max_body)
        self._seconds = config.engine.timeout + _EXTRA_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            response = await self._answer(scope, receive, send)
        except HttpRefusal as refusal:
            response = make_rest_error(refusal.status, str(refusal), refusal.headers)
        except UnknownModel as error:
            response = make_rest_error(404, str(error))
        except RequestRefused as error:
            response = make_rest_error(400, str(error))
        except TritonFailure as error:
            response = make_rest_error(to_status(error.code), str(error))
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Answer a request. Returns None if the response was sent already, or the client has disconnected."""
        path = scope["path"]
        if path == "/v2":
            _check_method(scope, "GET")
            metadata = await self._triton.call("ServerMetadata", service_pb2.ServerMetadataRequest(), _CALL_SECONDS)
            return _respond(read_server_metadata(metadata))
        if path in HEALTH_PATHS:
            _check_method(scope, "GET")
            # Live: this process runs, and restarts Triton if need be. Ready: the models answer.
            if path.endswith("live") or await self._triton.is_server_ready():
                return Response(b"", 200)
            return make_rest_error(503, "the model is not ready")
        if path == "/v2/models/stats":
            _check_method(scope, "GET")
            return await self._answer_statistics("", "")
        found = _MODEL.fullmatch(path)
        if found is None:
            raise HttpRefusal(404, "Not Found")
        name, version, kind = found[1], found[2] or "", found[3] or "metadata"
        if name not in self._config.triton.models:
            if kind == "ready":
                return make_rest_error(400, _NOT_READY)
            raise UnknownModel(f"Request for unknown model: {quote(name)} is not found")
        if kind == "infer":
            _check_method(scope, "POST")
            return await self._infer(name, version, scope, receive)
        if kind in ("generate", "generate_stream"):
            _check_method(scope, "POST")
            return await self._generate(name, version, scope, receive, send, streams=kind == "generate_stream")
        _check_method(scope, "GET")
        if kind == "ready":
            ready = await self._call("ModelReady", service_pb2.ModelReadyRequest, name, version)
            return Response(b"", 200) if ready.ready else make_rest_error(400, _NOT_READY)
        if kind == "config":
            answer = await self._call("ModelConfig", service_pb2.ModelConfigRequest, name, version)
            return _respond(to_dict(answer.config))
        if kind == "stats":
            return await self._answer_statistics(name, version)
        return _respond(
            read_model_metadata(await self._call("ModelMetadata", service_pb2.ModelMetadataRequest, name, version))
        )

    async def _answer_statistics(self, name: str, version: str) -> Response:
        return _respond(to_dict(await self._call("ModelStatistics", service_pb2.ModelStatisticsRequest, name, version)))

    async def _call(self, method: str, kind: Any, name: str, version: str) -> Any:
        return await self._triton.call(method, kind(name=name, version=version), _CALL_SECONDS)

    # asking the models

    async def _infer(self, name: str, version: str, scope: Scope, receive: Receive) -> Response | None:
        headers = dict(scope["headers"])
        body = await _receive_body(receive)
        limits = await self._forms.get_limits()
        form = _find_form(limits.models, name)
        if form.decoupled:
            raise HttpRefusal(501, "HTTP end point doesn't support models with decoupled transaction policy")
        encoding = headers.get(b"content-encoding", b"").strip().lower()

        def read() -> InferRequest:
            content = unpack(body, encoding, self._config.engine.max_body)
            asked = read_infer(content, headers.get(HEADER_LENGTH), name, version)
            check_infer_request(asked.request, limits)
            return asked

        asked = await _read_aside(read, body)
        async with EndsWithClient(receive) as client:
            answer = await self._triton.call("ModelInfer", asked.request, self._seconds)
        if client.gone:
            return None
        content, head_length = write_infer(answer, asked)
        if head_length is None:
            return Response(content, media_type=_JSON)
        return Response(content, headers={"Inference-Header-Content-Length": str(head_length)}, media_type=_BYTES)

    async def _generate(
        self, name: str, version: str, scope: Scope, receive: Receive, send: Send, *, streams: bool
    ) -> Response | None:
        encoding = dict(scope["headers"]).get(b"content-encoding", b"").strip().lower()
        if encoding not in (b"", b"identity"):
            raise HttpRefusal(415, "Unsupported content-encoding, only 'identity' is supported.")
        body = await _receive_body(receive)
        limits = await self._forms.get_limits()
        form = _find_form(limits.models, name)

        def read() -> service_pb2.ModelInferRequest:
            request = read_generate(read_object(body), form, version)
            check_infer_request(request, limits)
            return request

        request = await _read_aside(read, body)
        request.parameters[RELAYED].string_param = uuid.uuid4().hex  # so that its errors have a code
        responses = self._stream(request)
        async with EndsWithClient(receive), contextlib.aclosing(responses):
            if streams:
                await _send_events(responses, send)
                return None
            found = [response async for response in responses]
            if len(found) != 1:
                raise HttpRefusal(400, _NOT_ONE)
            return Response(write_generate(found[0]), media_type=_JSON)
        return None  # the client has disconnected

    async def _stream(self, request: service_pb2.ModelInferRequest) -> Any:
        """The responses of a model, as they come.

        Raises:
            TritonFailure: when an error comes in their place.
        """
        async with contextlib.aclosing(self._triton.stream(request, self._seconds)) as answers:
            async for answer in answers:
                if answer.error_message:
                    raise to_stream_failure(answer.error_message)
                if answer.infer_response.outputs:
                    yield answer.infer_response


async def _read_aside(read: Callable[[], _T], body: bytes) -> _T:
    """Call `read`; for a large body in a thread, so that other requests do not wait."""
    return await asyncio.to_thread(read) if len(body) > _LARGE else read()


async def _send_events(responses: Any, send: Send) -> None:
    """Send server-sent events. As in Triton the first one decides the status, even if it is an error."""

    async def begin(status: int) -> None:
        headers = [(b"content-type", _EVENTS.encode()), (b"cache-control", b"no-store")]
        headers += [(b"retry-after", b"1")] if status in (429, 503) else []
        await send({"type": "http.response.start", "status": status, "headers": headers})

    began = False
    try:
        async for response in responses:
            if not began:
                await begin(200)
                began = True
            await send(_make_event(write_generate(response)))
    except TritonFailure as error:
        if not began:
            await begin(to_status(error.code))
            began = True
        await send(_make_event(to_json({"error": str(error)[:4096]})))
    if not began:
        await begin(200)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _make_event(content: bytes) -> Message:
    return {"type": "http.response.body", "body": b"data: " + content + b"\n\n", "more_body": True}


def _respond(content: Any) -> Response:
    return Response(to_json(content), media_type=_JSON)


def _find_form(models: Mapping[str, ModelForm], name: str) -> ModelForm:
    form = models.get(name)
    if form is None:
        raise UnknownModel(f"Request for unknown model: {quote(name)} is not found")
    return form


def _check_method(scope: Scope, wanted: str) -> None:
    if scope["method"] != wanted:
        raise HttpRefusal(405, "Method Not Allowed", {"Allow": wanted})


async def _receive_body(receive: Receive) -> bytes:
    """Receive the body of a request, which the guard has limited and passes on in one piece."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise HttpRefusal(400, "the request was not complete")
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)
