"""KServe's REST and Triton's generate extension, as in Triton 24.10. Each request becomes one of gRPC to Triton.

There is no other route: what loads models, shares memory, traces or sets the log does not exist here.
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
from oarlock.serve.front.http.refusal import HttpRefusal, shown
from oarlock.serve.front.model_forms import ModelForm, ModelForms
from oarlock.serve.front.rest.generate import read_generate, write_generate
from oarlock.serve.front.rest.infer import InferQuestion, read_infer, to_json, unpacked, write_infer
from oarlock.serve.front.rest.metadata import as_dict, model_metadata, server_metadata
from oarlock.serve.triton.client import TritonClient, TritonFailure, stream_failure
from oarlock.serve.triton.fields import RELAYED

HEALTH_PATHS = ("/v2/health/live", "/v2/health/ready")
_MODEL = re.compile(
    r"/v2/models/([^/]+)(?:/versions/([0-9]{1,18}))?(?:/(infer|generate|generate_stream|ready|config|stats))?"
)
_JSON, _EVENTS, _BYTES = "application/json", "text/event-stream; charset=utf-8", "application/octet-stream"
_STATUS = {  # as Triton's REST has them
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
_ASK_SECONDS, _MORE_SECONDS = 30.0, 30.0
_LARGE = 65536  # bytes of a body
_T = TypeVar("_T")


def make_rest_app(config: ServeConfig, triton: TritonClient) -> ASGIApp:
    """The application of the REST port. It belongs behind a Guard, which hands it bodies that are whole."""
    return _Rest(config, triton)


def rest_error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as Triton writes it."""
    headers = {**(headers or {}), **({"Retry-After": "1"} if status in (429, 503) else {})}
    return Response(to_json({"error": message[:4096]}), status, headers, _JSON)


def status_of(code: grpc.StatusCode) -> int:
    """The status that says what a code of gRPC says."""
    return _STATUS.get(code, 500)


class _Rest:
    """The routes."""

    def __init__(self, config: ServeConfig, triton: TritonClient) -> None:
        self._config, self._triton = config, triton
        self._forms = ModelForms(triton, config.triton.models, config.engine.max_body)
        self._seconds = config.engine.timeout + _MORE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        try:
            response = await self._answer(scope, receive, send)
        except HttpRefusal as refusal:
            response = rest_error(refusal.status, str(refusal), refusal.headers)
        except UnknownModel as error:
            response = rest_error(404, str(error))
        except RequestRefused as error:
            response = rest_error(400, str(error))
        except TritonFailure as error:
            response = rest_error(status_of(error.code), str(error))
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """What a route answers; None when it did so itself, or nobody is there any more."""
        path = scope["path"]
        if path == "/v2":
            _check_method(scope, "GET")
            asked = await self._triton.call("ServerMetadata", service_pb2.ServerMetadataRequest(), _ASK_SECONDS)
            return _json(server_metadata(asked))
        if path in HEALTH_PATHS:
            _check_method(scope, "GET")
            return await self._health(path)
        if path == "/v2/models/stats":
            _check_method(scope, "GET")
            return await self._statistics("", "")
        found = _MODEL.fullmatch(path)
        if found is None:
            raise HttpRefusal(404, "Not Found")
        name, version, kind = found[1], found[2] or "", found[3] or "metadata"
        if name not in self._config.triton.models:
            if kind == "ready":
                return rest_error(400, _NOT_READY)
            raise UnknownModel(f"Request for unknown model: {shown(name)} is not found")
        if kind == "infer":
            _check_method(scope, "POST")
            return await self._infer(name, version, scope, receive)
        if kind in ("generate", "generate_stream"):
            _check_method(scope, "POST")
            return await self._generate(name, version, scope, receive, send, streams=kind == "generate_stream")
        _check_method(scope, "GET")
        return await self._about(kind, name, version)

    async def _health(self, path: str) -> Response:
        """Live is this process, behind which Triton is started again; ready, that the models can be asked."""
        if path.endswith("live") or await self._triton.is_server_ready():
            return Response(b"", 200)
        return rest_error(503, "the model is not ready")

    async def _about(self, kind: str, name: str, version: str) -> Response:
        if kind == "ready":
            ready = await self._asked("ModelReady", service_pb2.ModelReadyRequest, name, version)
            return Response(b"", 200) if ready.ready else rest_error(400, _NOT_READY)
        if kind == "config":
            asked = await self._asked("ModelConfig", service_pb2.ModelConfigRequest, name, version)
            return _json(as_dict(asked.config))
        if kind == "stats":
            return await self._statistics(name, version)
        return _json(
            model_metadata(await self._asked("ModelMetadata", service_pb2.ModelMetadataRequest, name, version))
        )

    async def _statistics(self, name: str, version: str) -> Response:
        return _json(as_dict(await self._asked("ModelStatistics", service_pb2.ModelStatisticsRequest, name, version)))

    async def _asked(self, method: str, kind: Any, name: str, version: str) -> Any:
        return await self._triton.call(method, kind(name=name, version=version), _ASK_SECONDS)

    # asking the models

    async def _infer(self, name: str, version: str, scope: Scope, receive: Receive) -> Response | None:
        headers = dict(scope["headers"])
        body = await _body(receive)
        limits = await self._forms.limits()
        form = _known(limits.models, name)
        if form.decoupled:
            raise HttpRefusal(501, "HTTP end point doesn't support models with decoupled transaction policy")
        encoding = headers.get(b"content-encoding", b"").strip().lower()

        def read() -> InferQuestion:
            content = unpacked(body, encoding, self._config.engine.max_body)
            question = read_infer(content, headers.get(HEADER_LENGTH), name, version)
            check_infer_request(question.request, limits)
            return question

        question = await _aside(read, body)
        async with EndsWithClient(receive) as client:
            answer = await self._triton.call("ModelInfer", question.request, self._seconds)
        if client.gone:
            return None
        content, head_length = write_infer(answer, question)
        if head_length is None:
            return Response(content, media_type=_JSON)
        return Response(content, headers={"Inference-Header-Content-Length": str(head_length)}, media_type=_BYTES)

    async def _generate(
        self, name: str, version: str, scope: Scope, receive: Receive, send: Send, *, streams: bool
    ) -> Response | None:
        encoding = dict(scope["headers"]).get(b"content-encoding", b"").strip().lower()
        if encoding not in (b"", b"identity"):
            raise HttpRefusal(415, "Unsupported content-encoding, only 'identity' is supported.")
        body = await _body(receive)
        limits = await self._forms.limits()
        form = _known(limits.models, name)

        def read() -> service_pb2.ModelInferRequest:
            request = read_generate(read_object(body), form, version)
            check_infer_request(request, limits)
            return request

        request = await _aside(read, body)
        request.parameters[RELAYED].string_param = uuid.uuid4().hex  # so that its errors have a code
        responses = self._responses(request)
        async with EndsWithClient(receive), contextlib.aclosing(responses):
            if streams:
                await _send_events(responses, send)
                return None
            found = [response async for response in responses]
            if len(found) != 1:
                raise HttpRefusal(400, _NOT_ONE)
            return Response(write_generate(found[0]), media_type=_JSON)
        return None  # the client is gone

    async def _responses(self, request: service_pb2.ModelInferRequest) -> Any:
        """The responses of a model as they come.

        Raises:
            TritonFailure: when there is an error in their place.
        """
        async with contextlib.aclosing(self._triton.stream(request, self._seconds)) as answers:
            async for answer in answers:
                if answer.error_message:
                    raise stream_failure(answer.error_message)
                if answer.infer_response.outputs:
                    yield answer.infer_response


async def _aside(read: Callable[[], _T], body: bytes) -> _T:
    """What `read` makes of a body, of which a large one does not hold up the others."""
    return await asyncio.to_thread(read) if len(body) > _LARGE else read()


async def _send_events(responses: Any, send: Send) -> None:
    """Server-sent events. The first one decides the status, also where it is an error, as with Triton."""

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
            await send(_event(write_generate(response)))
    except TritonFailure as error:
        if not began:
            await begin(status_of(error.code))
            began = True
        await send(_event(to_json({"error": str(error)[:4096]})))
    if not began:
        await begin(200)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(content: bytes) -> Message:
    return {"type": "http.response.body", "body": b"data: " + content + b"\n\n", "more_body": True}


def _json(content: Any) -> Response:
    return Response(to_json(content), media_type=_JSON)


def _known(models: Mapping[str, ModelForm], name: str) -> ModelForm:
    form = models.get(name)
    if form is None:
        raise UnknownModel(f"Request for unknown model: {shown(name)} is not found")
    return form


def _check_method(scope: Scope, wanted: str) -> None:
    if scope["method"] != wanted:
        raise HttpRefusal(405, "Method Not Allowed", {"Allow": wanted})


async def _body(receive: Receive) -> bytes:
    """Of a request; the guard has limited it, and hands it over in one piece."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise HttpRefusal(400, "the request was not complete")
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)
