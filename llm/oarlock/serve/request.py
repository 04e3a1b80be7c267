"""A request to the engine and the chunks of its answer. Imports neither paddle nor pydantic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from oarlock.errors import OarlockError, RequestRefused
from oarlock.sampling.params import SamplingParams, is_list_of

FinishReason = Literal["stop", "length", "cancelled", "error"]


class PromptTooLong(RequestRefused):
    """A prompt that leaves no space for an answer."""


class QueueFull(OarlockError):
    """The queue is full, or the engine is closing. The client may try again later."""


@dataclass(frozen=True)
class Prompt:
    """The prompt of a request: exactly one of text, messages and token_ids.

    Attributes:
        text: a raw prompt; the tokenizer's begin token is added.
        messages: of a chat, {"role": ..., "content": ...}, put into the model's chat template.
        token_ids: a tokenized prompt, used as it is.
        adapter: name of a LoRA adapter; None for the base model.
        tools: descriptions of functions in OpenAI's form, for the template, with messages.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    adapter: str | None = None
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        """Refuse anything but one well-formed kind of prompt.

        Raises:
            RequestRefused: saying what is wrong.
        """
        given = [name for name in ("text", "messages", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestRefused(f"give one of text, messages and token_ids; got {', '.join(given) or 'none'}")
        if self.text is not None and not isinstance(self.text, str):
            raise RequestRefused(f"text must be a text; got {type(self.text).__name__}")
        if self.tools is not None and self.messages is None:
            raise RequestRefused("tools go with messages")
        if self.token_ids is not None and not is_list_of(self.token_ids, int):
            raise RequestRefused("token_ids must be whole numbers")


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how it is answered.

    Attributes:
        stream: send each chunk as it is made, and not the whole answer at its end.
    """

    prompt: Prompt
    sampling: SamplingParams
    stream: bool = True

    def check(self) -> None:
        """Refuse a malformed prompt and sampling parameters outside of their ranges.

        Raises:
            RequestRefused: saying what is wrong.
        """
        self.prompt.check()
        self.sampling.check()


@dataclass(frozen=True)
class TokenChunk:
    """The next part of an answer.

    Attributes:
        text: new text; empty while it may be the beginning of a stop text or of a character.
        token_ids: new tokens, without the one that ended the answer.
        finish_reason: None except in the last chunk: "stop" (an end token or a stop text), "length", "cancelled" or
            "error".
        prompt_tokens: number of tokens of the prompt.
        completion_tokens: number of tokens of the answer up to here.
        error: what went wrong, for people.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    error: str = ""


def join_chunks(chunks: Iterable[TokenChunk]) -> TokenChunk:
    """Consecutive chunks of one answer as one chunk.

    Args:
        chunks: at least one.
    """
    found = list(chunks)
    if len(found) == 1:
        return found[0]
    last = found[-1]
    return TokenChunk(
        "".join(chunk.text for chunk in found),
        tuple(token for chunk in found for token in chunk.token_ids),
        last.finish_reason,
        last.prompt_tokens,
        last.completion_tokens,
        last.error,
    )
