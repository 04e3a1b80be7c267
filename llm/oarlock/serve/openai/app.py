"""The OpenAI-compatible endpoint: a FastAPI application that asks Triton over gRPC. Does not import paddle."""

from __future__ import annotations

import http
import json
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from oarlock import __version__
from oarlock.serve.front.options import FrontOptions
from oarlock.serve.front.upstream import Upstream
from oarlock.serve.openai.errors import error_response
from oarlock.serve.openai.request_reading import JsonRoute, param_of, wrong_value
from oarlock.serve.openai.responses import ChatForm, CompletionForm, answer, status_of
from oarlock.serve.openai.schema import (
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
        403: "The Host is not a name of this server, or the web page may not ask it.",
        404: "There is no such model.",
        405: "Another method is meant.",
        408: "The request was not complete in time.",
        413: "The request is too large, or comes in too many pieces.",
        415: "The request is not JSON.",
        429: "Too many requests are open.",
        503: "The model can't be asked now.",
    }.items()
}


def make_openai_app(options: FrontOptions, upstream: Upstream) -> FastAPI:
    """The application. It belongs behind a Guard, which looks at keys, sizes and who asks."""
    app = FastAPI(title="Oarlock", version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    _add_error_handlers(app)
    _add_routes(app, TritonClient(upstream, options.model), options.model, options.temperature)
    _describe(app, bool(options.keys))
    return app


def _add_routes(app: FastAPI, client: TritonClient, model: str, temperature: float) -> None:
    started = int(time.time())

    async def card_names() -> list[str]:
        return [model, *await client.adapters()]

    async def check_name(name: str) -> dict[str, str]:
        if name == model:
            return {}
        if name in await client.adapters():
            return {"adapter": name}
        raise HTTPException(404, f"there is no model {name!r} here (there are: {', '.join(await card_names())})")

    @app.get("/health", response_model=Health, responses={503: _ERRORS[503]}, summary="Whether the model answers")
    async def health() -> Any:
        return Health() if await client.is_ready() else error_response(503, "the model is not ready")

    models_errors: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (400, 401, 403, 429, 503)}

    @app.get("/v1/models", response_model=ModelList, responses=models_errors, summary="The base and its adapters")
    async def models() -> Any:
        return ModelList(data=[ModelCard(id=name, created=started) for name in await card_names()])

    @app.get("/v1/models/{name}", response_model=ModelCard, responses=models_errors | {404: _ERRORS[404]})
    async def one_model(name: str) -> Any:
        await check_name(name)
        return ModelCard(id=name, created=started)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS)
    async def chat(body: ChatRequest, request: Request) -> Any:
        tools = {"tools": json.dumps(body.tools)} if body.tools else {}
        prompt = {"messages": json.dumps(body.messages)} | tools
        jobs = _jobs(body, [prompt | await check_name(body.model)], temperature)
        return await answer(client, jobs, body, ChatForm(body.model), request)

    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        adapter = await check_name(body.model)
        prompts: list[dict[str, Any]] = [
            {"text_input": prompt} if isinstance(prompt, str) else {"input_ids": prompt} for prompt in body.prompt
        ]
        jobs = _jobs(body, [prompt | adapter for prompt in prompts], temperature)
        return await answer(client, jobs, body, CompletionForm(body.model), request)


def _jobs(
    body: ChatRequest | CompletionRequest, prompts: list[dict[str, Any]], temperature: float
) -> list[dict[str, Any]]:
    """One request to Triton for each prompt and answer wanted; with a seed, each answer of a prompt has its own."""
    jobs = []
    for prompt in prompts:
        for i in range(body.n or 1):
            seed = {} if body.seed is None else {"seed": (body.seed + i + 2**63) % 2**64 - 2**63}
            jobs.append({"temperature": temperature} | body.fields() | prompt | seed)
    try:
        json.dumps(jobs, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise HTTPException(400, f"the text is not valid Unicode: {error.reason}") from error
    return jobs


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        found = wrong_value(error.errors()[0])
        return error_response(400, str(found.detail), param=found.param or None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        param = getattr(error, "param", "") or None
        message = str(error.detail)
        if message == http.HTTPStatus(error.status_code).phrase:  # an address or method that is not here
            allowed = next((v for k, v in (error.headers or {}).items() if k.lower() == "allow"), "")
            why = f"this address takes {allowed}" if allowed else "there is no such address here"
            message = f"{request.method} {request.url.path}: {why}"
        return error_response(error.status_code, message, param=param, headers=error.headers)

    @app.exception_handler(TritonFailure)
    async def failed(_: Request, error: TritonFailure) -> JSONResponse:
        return error_response(status_of(error), str(error), param=param_of(str(error)) or None)


def _describe(app: FastAPI, with_keys: bool) -> None:
    """The OpenAPI description, with the errors that are given in the place of FastAPI's own."""
    make = app.openapi

    def described() -> dict[str, Any]:
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

    app.openapi = described  # type: ignore[method-assign]
