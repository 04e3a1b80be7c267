"""What OpenAI's clients send and get, as far as a model that makes text can answer (pydantic models, for FastAPI)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_TOKEN_BITS = 2**31 - 1
Text = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Text], Field(max_length=16)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_TOKEN_BITS)]], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Accepted; nothing is obfuscated here.")


class TextPart(_Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _Request(_Strict):
    """What both kinds of request have.

    `top_k`, `min_tokens`, `repetition_penalty`, `ignore_eos` and `stop_token_ids` are additions that vLLM has too.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: int | None = Field(None, ge=1, le=_TOKEN_BITS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Text | Stops | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: int | None = Field(None, ge=0, le=_TOKEN_BITS)
    min_tokens: int | None = Field(None, ge=0, le=_TOKEN_BITS)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=_TOKEN_BITS)]], Field(max_length=256)] | None = None

    def fields(self) -> dict[str, Any]:
        """Values of the streaming model's tensors (see triton_fields) that are given, without prompt and seed."""
        values = {
            name: getattr(self, name)
            for name in (
                *("max_tokens", "top_p", "top_k", "min_tokens", "frequency_penalty", "presence_penalty"),
                *("repetition_penalty", "ignore_eos", "stop_token_ids", "temperature"),
            )
        }
        values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return {name: value for name, value in values.items() if value is not None}

    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=_TOKEN_BITS)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    logprobs: Literal[False] | None = None

    def fields(self) -> dict[str, Any]:
        """As of both, with the newer name of max_tokens."""
        newer = self.max_completion_tokens
        return super().fields() | ({} if newer is None else {"max_tokens": newer})


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)] | TokenIds], Field(min_length=1, max_length=16)]
    )
    max_tokens: int | None = Field(16, ge=1, le=_TOKEN_BITS)
    echo: Literal[False] | None = None
    logprobs: None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """One for each prompt."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class Usage(BaseModel):
    """Tokens of a request and its answers."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer of a chat."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: None = None


class ChatCompletion(BaseModel):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(BaseModel):
    """One answer of a completion."""

    index: int
    text: str
    finish_reason: str
    logprobs: None = None


class Completion(BaseModel):
    """The answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that can be asked: the base, or an adapter beside it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "oarlock"


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class ErrorResponse(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorBody


class Health(BaseModel):
    """The answer to GET /health."""

    status: Literal["ok"] = "ok"
