"""The OpenAI-compatible endpoint: a FastAPI application that asks Triton over gRPC. Does not import paddle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from oarlock import __version__
from oarlock.serve.openai_guard import Guard, error_response
from oarlock.serve.openai_schema import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Usage,
)
from oarlock.serve.triton_client import Part, TritonClient, TritonFailure

_T = TypeVar("_T")
_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.CANCELLED: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 503,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request is wrong.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        405: "Another method is meant.",
        413: "The request is too large.",
        429: "Too many requests wait.",
        503: "The model can't be asked now.",
    }.items()
}


@dataclass(frozen=True)
class ApiOptions:
    """What the endpoint is told.

    Attributes:
        triton: HOST:PORT of Triton's gRPC.
        model: Triton's streaming model; clients use its name for the base.
        keys: API keys, any of which a request has to bring; empty for none.
        max_body: bytes of a request.
        max_open: requests that may be open; further ones get 429.
    """

    triton: str
    model: str
    keys: tuple[str, ...]
    max_body: int
    max_open: int


def make_app(options: ApiOptions) -> FastAPI:
    """The application."""
    client: list[TritonClient] = []  # made in the event loop it is used in

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        client.append(TritonClient(options.triton, options.model))
        yield
        await client[0].close()

    app = FastAPI(title="Oarlock", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, keys=options.keys, max_body=options.max_body, max_open=options.max_open)
    _add_error_handlers(app)
    _add_routes(app, lambda: client[0], options.model)
    _describe(app, bool(options.keys))
    return app


def _add_routes(app: FastAPI, client: Callable[[], TritonClient], model: str) -> None:
    started = int(time.time())

    async def card_names() -> list[str]:
        return [model, *await client().adapters()]

    async def check_name(name: str) -> dict[str, str]:
        if name == model:
            return {}
        if name in await client().adapters():
            return {"adapter": name}
        raise HTTPException(404, f"there is no model {name!r} here (there is: {', '.join(await card_names())})")

    @app.get("/health", response_model=Health, responses={503: _ERRORS[503]}, summary="Whether the model answers")
    async def health() -> Any:
        return Health() if await client().is_ready() else error_response(503, "the model is not ready")

    models_errors: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (401, 503)}

    @app.get("/v1/models", response_model=ModelList, responses=models_errors, summary="The base and its adapters")
    async def models() -> Any:
        return ModelList(data=[ModelCard(id=name, created=started) for name in await card_names()])

    @app.get("/v1/models/{name}", response_model=ModelCard, responses=models_errors | {404: _ERRORS[404]})
    async def one_model(name: str) -> Any:
        await check_name(name)
        return ModelCard(id=name, created=started)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS)
    async def chat(body: ChatRequest, request: Request) -> Any:
        messages = [{"role": message.role, "content": message.text()} for message in body.messages]
        prompt = {"messages": json.dumps(messages)}
        jobs = _jobs(body, [prompt | await check_name(body.model)])
        return await _answer(client(), jobs, body, _ChatForm(body.model), request)

    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        adapter = await check_name(body.model)
        prompts: list[dict[str, Any]] = [
            {"text_input": prompt} if isinstance(prompt, str) else {"input_ids": prompt} for prompt in body.prompts()
        ]
        jobs = _jobs(body, [prompt | adapter for prompt in prompts])
        return await _answer(client(), jobs, body, _CompletionForm(body.model), request)


def _jobs(body: ChatRequest | CompletionRequest, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One request to Triton for each prompt and answer wanted; with a seed, each answer of a prompt has its own."""
    jobs = []
    for prompt in prompts:
        for i in range(body.n or 1):
            seed = {} if body.seed is None else {"seed": (body.seed + i + 2**63) % 2**64 - 2**63}
            jobs.append(body.fields() | prompt | seed)
    try:
        json.dumps(jobs, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise HTTPException(400, f"the text is not valid Unicode: {error.reason}") from error
    return jobs


class _Form:
    """How an answer of a kind looks."""

    def __init__(self, model: str, prefix: str) -> None:
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


class _ChatForm(_Form):
    def __init__(self, model: str) -> None:
        super().__init__(model, "chatcmpl")
        self.chunk = "chat.completion.chunk"

    def first(self, index: int) -> list[dict[str, Any]]:
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def piece(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish}

    def whole(self, answers: list[tuple[str, str]], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(index=i, message=AnswerMessage(content=text), finish_reason=finish)
            for i, (text, finish) in enumerate(answers)
        ]
        return ChatCompletion(choices=choices, usage=usage, **self.head)  # type: ignore[arg-type]


class _CompletionForm(_Form):
    def __init__(self, model: str) -> None:
        super().__init__(model, "cmpl")
        self.chunk = "text_completion"

    def first(self, index: int) -> list[dict[str, Any]]:
        return []

    def piece(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def whole(self, answers: list[tuple[str, str]], usage: Usage) -> Completion:
        choices = [CompletionChoice(index=i, text=text, finish_reason=end) for i, (text, end) in enumerate(answers)]
        return Completion(choices=choices, usage=usage, **self.head)  # type: ignore[arg-type]


async def _answer(
    client: TritonClient,
    jobs: list[dict[str, Any]],
    body: ChatRequest | CompletionRequest,
    form: _ChatForm | _CompletionForm,
    request: Request,
) -> Any:
    parts = _merged(client, jobs)
    if not body.stream:
        answers, usage = await _unless_gone(request, _collected(parts, len(jobs), body.n or 1))
        return form.whole(answers, usage)
    first = await _unless_gone(request, anext(parts))  # what is refused gets its status, not a broken stream
    return StreamingResponse(_events(first, parts, len(jobs), body, form), media_type="text/event-stream")


async def _unless_gone(request: Request, answer: Awaitable[_T]) -> _T:
    """The answer; when the client goes away before it is there, it is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waited: asyncio.Future[_T] = asyncio.ensure_future(answer)
    watch = asyncio.create_task(gone())
    try:
        await asyncio.wait((waited, watch), return_when=asyncio.FIRST_COMPLETED)
        if waited.done():
            return waited.result()
        raise HTTPException(503, "the client is gone")
    finally:
        for task in (waited, watch):
            task.cancel()
        await asyncio.gather(waited, watch, return_exceptions=True)


async def _merged(client: TritonClient, jobs: list[dict[str, Any]]) -> AsyncGenerator[tuple[int, Part], None]:
    """(job, part) of all as they come; closing it cancels them in Triton, and so does the first failure."""
    if len(jobs) == 1:  # the common case needs no tasks
        async with contextlib.aclosing(client.ask(jobs[0])) as parts:
            async for part in parts:
                yield 0, part
        return
    arrived: asyncio.Queue[tuple[int, Part | BaseException | None]] = asyncio.Queue()

    async def follow(i: int) -> None:
        try:
            async with contextlib.aclosing(client.ask(jobs[i])) as parts:
                async for part in parts:
                    arrived.put_nowait((i, part))
            arrived.put_nowait((i, None))
        except TritonFailure as error:
            arrived.put_nowait((i, error))

    tasks = [asyncio.create_task(follow(i)) for i in range(len(jobs))]
    try:
        left = len(jobs)
        while left:
            i, item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield i, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Counter:
    """Usage of all jobs; a prompt that is answered several times counts once, as with OpenAI."""

    def __init__(self, per_prompt: int) -> None:
        self._per_prompt = per_prompt
        self._prompts: dict[int, int] = {}
        self._answers: dict[int, int] = {}

    def add(self, job: int, part: Part) -> None:
        self._prompts[job // self._per_prompt] = part.prompt_tokens
        self._answers[job] = part.completion_tokens

    def usage(self) -> Usage:
        prompt, answer = sum(self._prompts.values()), sum(self._answers.values())
        return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


async def _collected(
    parts: AsyncGenerator[tuple[int, Part], None], num_jobs: int, per_prompt: int
) -> tuple[list[tuple[str, str]], Usage]:
    texts, ends, counter = [""] * num_jobs, [""] * num_jobs, _Counter(per_prompt)
    async with contextlib.aclosing(parts):
        async for i, part in parts:
            texts[i] += part.text
            ends[i] = part.finish_reason or ends[i]
            counter.add(i, part)
    return list(zip(texts, ends, strict=True)), counter.usage()


async def _events(
    first: tuple[int, Part],
    parts: AsyncGenerator[tuple[int, Part], None],
    num_jobs: int,
    body: ChatRequest | CompletionRequest,
    form: _ChatForm | _CompletionForm,
) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer."""
    counter = _Counter(body.n or 1)
    with_usage = body.includes_usage()

    def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        more = {"usage": usage} if with_usage else {}
        chunk = {**form.head, "object": form.chunk, "choices": choices, **more}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    async with contextlib.aclosing(parts):
        for i in range(num_jobs):
            for choice in form.first(i):
                yield event([choice])
        try:
            item: tuple[int, Part] | None = first
            while item is not None:
                i, part = item
                counter.add(i, part)
                if part.text or part.finish_reason:
                    yield event([form.piece(i, part.text, part.finish_reason or None)])
                item = await anext(parts, None)
        except TritonFailure as error:  # the status is sent already
            content = error_response(_STATUS.get(error.code, 500), str(error)).body
            yield f"data: {bytes(content).decode()}\n\n"
            return
        if with_usage:
            yield event([], counter.usage().model_dump())
        yield "data: [DONE]\n\n"


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(word) for word in first["loc"] if word != "body")
        return error_response(400, f"{place}: {first['msg']}" if place else str(first["msg"]), param=place or None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(TritonFailure)
    async def failed(_: Request, error: TritonFailure) -> JSONResponse:
        return error_response(_STATUS.get(error.code, 500), str(error))


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
