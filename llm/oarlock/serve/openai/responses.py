"""Answers of the OpenAI-compatible endpoint: from Triton's parts to whole objects, or to server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from oarlock.serve.openai.errors import error_body
from oarlock.serve.openai.schema import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Usage,
)
from oarlock.serve.triton.client import Part, TritonClient, TritonFailure

_T = TypeVar("_T")
_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.CANCELLED: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 503,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}


def status_of(failure: TritonFailure) -> int:
    """The HTTP status that says what Triton's code says."""
    return _STATUS.get(failure.code, 500)


class _Form:
    """How an answer of a kind looks."""

    def __init__(self, model: str, prefix: str) -> None:
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


class ChatForm(_Form):
    """Of a chat."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "chatcmpl")
        self.chunk = "chat.completion.chunk"

    def first(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunks before the first text."""
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def piece(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """The choice of a chunk."""
        return {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish}

    def whole(self, answers: list[tuple[str, str]], usage: Usage) -> ChatCompletion:
        """Of (text, finish reason) of each choice, not streamed."""
        choices = [
            ChatChoice(index=i, message=AnswerMessage(content=text), finish_reason=finish)
            for i, (text, finish) in enumerate(answers)
        ]
        return ChatCompletion(choices=choices, usage=usage, **self.head)  # type: ignore[arg-type]


class CompletionForm(_Form):
    """Of a completion."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "cmpl")
        self.chunk = "text_completion"

    def first(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunks before the first text."""
        return []

    def piece(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """The choice of a chunk."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def whole(self, answers: list[tuple[str, str]], usage: Usage) -> Completion:
        """Of (text, finish reason) of each choice, not streamed."""
        choices = [CompletionChoice(index=i, text=text, finish_reason=end) for i, (text, end) in enumerate(answers)]
        return Completion(choices=choices, usage=usage, **self.head)  # type: ignore[arg-type]


async def answer(
    client: TritonClient,
    jobs: list[dict[str, Any]],
    body: ChatRequest | CompletionRequest,
    form: ChatForm | CompletionForm,
    request: Request,
) -> Any:
    """What the client gets: the whole object, or a stream of events.

    Args:
        jobs: requests to Triton, one for each choice.

    Raises:
        TritonFailure: when the first of them is refused; of a stream that began, an event says it.
        HTTPException: when the client is gone.
    """
    parts = _merged(client, jobs, body.default_tokens)
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


async def _merged(
    client: TritonClient, jobs: list[dict[str, Any]], default_tokens: int | None
) -> AsyncGenerator[tuple[int, Part], None]:
    """(job, part) of all as they come; closing it cancels them in Triton, and so does the first failure."""
    if len(jobs) == 1:  # the common case needs no tasks
        async with contextlib.aclosing(client.ask(jobs[0], default_tokens)) as parts:
            async for part in parts:
                yield 0, part
        return
    arrived: asyncio.Queue[tuple[int, Part | BaseException | None]] = asyncio.Queue()

    async def follow(i: int) -> None:
        try:
            async with contextlib.aclosing(client.ask(jobs[i], default_tokens)) as parts:
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
    form: ChatForm | CompletionForm,
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
            yield f"data: {error_body(status_of(error), str(error)).decode()}\n\n"
            return
        if with_usage:
            yield event([], counter.usage().model_dump())
        yield "data: [DONE]\n\n"
