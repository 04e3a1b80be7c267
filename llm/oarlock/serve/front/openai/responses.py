"""Responses of the OpenAI-compatible endpoint: the chunks of answers as whole objects, or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from oarlock.serve.front.http.disconnect import EndsWithClient
from oarlock.serve.front.openai.errors import make_error_body
from oarlock.serve.front.openai.schema import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Usage,
)
from oarlock.serve.request import TokenChunk
from oarlock.serve.triton.client import TritonFailure

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.CANCELLED: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 503,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}


def to_status(failure: TritonFailure) -> int:
    """The HTTP status for Triton's code."""
    return _STATUS.get(failure.code, 500)


class _Form:
    """The form of a response."""

    def __init__(self, model: str, prefix: str) -> None:
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


class ChatForm(_Form):
    """The form of a chat completion."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "chatcmpl")
        self.event_kind = "chat.completion.chunk"

    def make_first(self, index: int) -> list[dict[str, Any]]:
        """Make the choices of events before the first text."""
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def make_choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Make the choice of an event."""
        return {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish}

    def make_whole(self, answers: list[tuple[str, str]], usage: Usage) -> ChatCompletion:
        """Make the whole object of (text, finish reason) of each choice."""
        choices = [
            ChatChoice(index=i, message=AnswerMessage(content=text), finish_reason=finish)
            for i, (text, finish) in enumerate(answers)
        ]
        return ChatCompletion(choices=choices, usage=usage, **self.head)  # type: ignore[arg-type]


class CompletionForm(_Form):
    """The form of a text completion."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "cmpl")
        self.event_kind = "text_completion"

    def make_first(self, index: int) -> list[dict[str, Any]]:
        """Make the choices of events before the first text."""
        return []

    def make_choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Make the choice of an event."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def make_whole(self, answers: list[tuple[str, str]], usage: Usage) -> Completion:
        """Make the whole object of (text, finish reason) of each choice."""
        choices = [CompletionChoice(index=i, text=text, finish_reason=end) for i, (text, end) in enumerate(answers)]
        return Completion(choices=choices, usage=usage, **self.head)  # type: ignore[arg-type]


async def respond(
    answers: list[AsyncGenerator[TokenChunk, None]],
    body: ChatRequest | CompletionRequest,
    form: ChatForm | CompletionForm,
    request: Request,
) -> Any:
    """Make the response: the whole object, or a stream of events.

    Args:
        answers: one for each choice.

    Raises:
        TritonFailure: when the first of them is refused. A stream that has begun reports it in an event.
        HTTPException: when the client has disconnected.
    """
    chunks, num_choices = _merge(answers), len(answers)
    async with EndsWithClient(request.receive):
        if not body.stream:
            texts, ends, counter = [""] * num_choices, [""] * num_choices, _UsageCounter(body.n or 1)
            async with contextlib.aclosing(chunks):
                async for i, chunk in chunks:
                    texts[i] += chunk.text
                    ends[i] = chunk.finish_reason or ends[i]
                    counter.add(i, chunk)
            return form.make_whole(list(zip(texts, ends, strict=True)), counter.usage())
        first = await anext(chunks)  # a refusal gets its status, not a broken stream
        return StreamingResponse(_events(first, chunks, num_choices, body, form), media_type="text/event-stream")
    raise HTTPException(503, "the client has disconnected")


async def _merge(
    answers: list[AsyncGenerator[TokenChunk, None]],
) -> AsyncGenerator[tuple[int, TokenChunk], None]:
    """(choice, chunk) of all answers as they come. Closing it cancels them in Triton, and so does the first failure."""
    if len(answers) == 1:  # the common case needs no tasks
        async with contextlib.aclosing(answers[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    arrived: asyncio.Queue[tuple[int, TokenChunk | BaseException | None]] = asyncio.Queue()

    async def follow(i: int) -> None:
        try:
            async with contextlib.aclosing(answers[i]) as chunks:
                async for chunk in chunks:
                    arrived.put_nowait((i, chunk))
            arrived.put_nowait((i, None))
        except TritonFailure as error:
            arrived.put_nowait((i, error))

    tasks = [asyncio.create_task(follow(i)) for i in range(len(answers))]
    try:
        left = len(answers)
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


class _UsageCounter:
    """Usage of all choices. A prompt that is answered several times counts once, as with OpenAI."""

    def __init__(self, per_prompt: int) -> None:
        self._per_prompt = per_prompt
        self._prompts: dict[int, int] = {}
        self._answers: dict[int, int] = {}

    def add(self, choice: int, chunk: TokenChunk) -> None:
        self._prompts[choice // self._per_prompt] = chunk.prompt_tokens
        self._answers[choice] = chunk.completion_tokens

    def usage(self) -> Usage:
        prompt, answer = sum(self._prompts.values()), sum(self._answers.values())
        return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


async def _events(
    first: tuple[int, TokenChunk],
    chunks: AsyncGenerator[tuple[int, TokenChunk], None],
    num_choices: int,
    body: ChatRequest | CompletionRequest,
    form: ChatForm | CompletionForm,
) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer."""
    counter = _UsageCounter(body.n or 1)

    def make_event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        more = {"usage": usage} if body.includes_usage else {}
        content = {**form.head, "object": form.event_kind, "choices": choices, **more}
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    async with contextlib.aclosing(chunks):
        for i in range(num_choices):
            for choice in form.make_first(i):
                yield make_event([choice])
        try:
            item: tuple[int, TokenChunk] | None = first
            while item is not None:
                i, chunk = item
                counter.add(i, chunk)
                if chunk.text or chunk.finish_reason:
                    yield make_event([form.make_choice(i, chunk.text, chunk.finish_reason)])
                item = await anext(chunks, None)
        except TritonFailure as error:  # the status has been sent
            yield f"data: {make_error_body(to_status(error), str(error)).decode()}\n\n"
            return
        if body.includes_usage:
            yield make_event([], counter.usage().model_dump())
        yield "data: [DONE]\n\n"
