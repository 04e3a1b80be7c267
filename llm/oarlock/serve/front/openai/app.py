"""The OpenAI-compatible endpoint: a FastAPI application that calls Triton over gRPC. Does not import paddle."""

from __future__ import annotations

import http
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from oarlock import __version__
from oarlock.errors import RequestRefused
from oarlock.serve.config import ServeConfig
from oarlock.serve.front.openai.errors import make_error_response
from oarlock.serve.front.openai.request_reading import JsonRoute, explain_error, find_param
from oarlock.serve.front.openai.responses import ChatForm, CompletionForm, respond, to_status
from oarlock.serve.front.openai.schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
)
from oarlock.serve.triton.client import TritonClient, TritonFailure

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request is wrong.",
        401: "The API key is missing or wrong.",
        403: "The Host is not a name of this server, or the web page may not send requests.",
        404: "There is no such model.",
        405: "The address does not take this method.",
        408: "The request was not complete in time.",
        413: "The request is too large, or arrives in too many pieces.",
        415: "The request is not JSON.",
        429: "Too many requests are open.",
        503: "The model can't answer now.",
    }.items()
}


def make_openai_app(config: ServeConfig, triton: TritonClient, with_keys: bool = False) -> FastAPI:
    """Make the application. A Guard in front of it checks keys, sizes and senders."""
    app = FastAPI(title="Oarlock", version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    _add_error_handlers(app)
    _add_routes(app, triton, config.triton.model, config.front.temperature)
    _describe(app, with_keys)
    return app


def _add_routes(app: FastAPI, triton: TritonClient, model: str, temperature: float) -> None:
    started = int(time.time())

    async def list_names() -> list[str]:
        return [model, *await triton.list_adapters(model)]

    async def find_adapter(name: str) -> str | None:
        """The adapter that a model name means; None for the base."""
        if name == model:
            return None
        names = await list_names()
        if name not in names:
            raise HTTPException(404, f"there is no model {name!r} here (there are: {', '.join(names)})")
        return name

    @app.get("/health", response_model=Health, responses={503: _ERRORS[503]}, summary="Whether the model answers")
    async def health() -> Any:
        return Health() if await triton.is_model_ready(model) else make_error_response(503, "the model is not ready")

    models_errors: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (400, 401, 403, 429, 503)}

    @app.get("/v1/models", response_model=ModelList, responses=models_errors, summary="The base and its adapters")
    async def models() -> Any:
        return ModelList(data=[ModelCard(id=name, created=started) for name in await list_names()])

    @app.get("/v1/models/{name}", response_model=ModelCard, responses=models_errors | {404: _ERRORS[404]})
    async def one_model(name: str) -> Any:
        await find_adapter(name)
        return ModelCard(id=name, created=started)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS)
    async def chat(body: ChatRequest, request: Request) -> Any:
        requests = body.make_requests(temperature, await find_adapter(body.model))
        answers = [triton.generate(model, one) for one in requests]
        return await respond(answers, body, ChatForm(body.model), request)

    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        requests = body.make_requests(temperature, await find_adapter(body.model))
        answers = [triton.generate(model, one) for one in requests]
        return await respond(answers, body, CompletionForm(body.model), request)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def answer_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = explain_error(error.errors()[0])
        return make_error_response(400, str(found.detail), param=found.param or None)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
        param = getattr(error, "param", "") or None
        message = str(error.detail)
        if message == http.HTTPStatus(error.status_code).phrase:  # an unknown address or method
            allowed = next((v for k, v in (error.headers or {}).items() if k.lower() == "allow"), "")
            why = f"this address takes {allowed}" if allowed else "there is no such address here"
            message = f"{request.method} {request.url.path}: {why}"
        return make_error_response(error.status_code, message, param=param, headers=error.headers)

    @app.exception_handler(RequestRefused)
    async def answer_refusal(_: Request, error: RequestRefused) -> JSONResponse:
        return make_error_response(400, str(error), param=find_param(str(error)) or None)

    @app.exception_handler(TritonFailure)
    async def answer_failure(_: Request, error: TritonFailure) -> JSONResponse:
        return make_error_response(to_status(error), str(error), param=find_param(str(error)) or None)


def _describe(app: FastAPI, with_keys: bool) -> None:
    """Set the OpenAPI description, with our errors in place of FastAPI's."""
    make = app.openapi

    def make_described() -> dict[str, Any]:
        content = make()
        for methods in content["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if with_keys:
                    operation["security"] = [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            content.get("components", {}).get("schemas", {}).pop(name, None)
        if with_keys:
            content.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return content

    app.openapi = make_described  # type: ignore[method-assign]
