"""What OpenAI's clients send and get, as far as a model that makes text can answer (pydantic models, for FastAPI)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from oarlock.model_config.sampling_ranges import MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_STOPS, OPENAI_RANGES
from oarlock.serve.openai.request_reading import read_chat, read_object, read_prompts, read_stops

_IN, _REPETITION = OPENAI_RANGES, OPENAI_RANGES["repetition_penalty"]
_TOKEN_BITS = 2**31 - 1
_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": _TOKEN_BITS}}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "additionalProperties": False,
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART}]},
        "name": {"type": "string"},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
        "reasoning_content": {"type": "string"},
    },
}


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Token = Annotated[Whole, Field(ge=0, le=_TOKEN_BITS)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(read_stops),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}]}),
]
Messages = Annotated[list[Any], WithJsonSchema({"type": "array", "minItems": 1, "items": _MESSAGE})]
Tools = Annotated[
    list[Any],
    WithJsonSchema({"type": "array", "items": {"type": "object", "required": ["type", "function"], "properties": {
        "type": {"const": "function"}, "function": {"type": "object", "required": ["name"], "properties": {
            "name": {"type": "string", "minLength": 1}, "description": {"type": "string"},
            "parameters": {"type": "object"}}}}}}),
]  # fmt: skip
_ONE_PROMPT = {"anyOf": [_TEXT, _TOKENS]}
Prompts = Annotated[
    list[Any],
    BeforeValidator(read_prompts),
    WithJsonSchema({"anyOf": [*_ONE_PROMPT["anyOf"], {"type": "array", "minItems": 1, "items": _ONE_PROMPT}]}),
]


class _Strict(BaseModel):
    """JSON's types as they are: "1" is no number, 1 is not true. What says nothing is absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    path: ClassVar[str] = ""  # where it stands in a request

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return read_object(given, cls.model_fields, cls.path)


class StreamOptions(_Strict):
    """Of a streamed answer."""

    path: ClassVar[str] = "stream_options"

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Accepted; nothing is obfuscated here.")


class _Request(_Strict):
    """What both kinds of request have.

    `top_k`, `min_tokens`, `repetition_penalty`, `ignore_eos` and `stop_token_ids` are additions that vLLM has too.
    """

    default_tokens: ClassVar[int | None] = None  # of an answer without max_tokens, as far as the context allows

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Whole | None = Field(None, ge=1, le=_TOKEN_BITS)
    temperature: float | None = Field(None, ge=_IN["temperature"].least, le=_IN["temperature"].most)
    top_p: float | None = Field(None, gt=_IN["top_p"].least, le=_IN["top_p"].most)
    n: Whole | None = Field(None, ge=1, le=16)
    seed: Whole | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stops | None = None
    frequency_penalty: float | None = Field(None, ge=_IN["frequency_penalty"].least, le=_IN["frequency_penalty"].most)
    presence_penalty: float | None = Field(None, ge=_IN["presence_penalty"].least, le=_IN["presence_penalty"].most)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: Whole | None = Field(None, ge=-1, le=_TOKEN_BITS, description="0 or -1 for all")
    min_tokens: Whole | None = Field(None, ge=0, le=_TOKEN_BITS)
    repetition_penalty: float | None = Field(
        None, gt=_IN["repetition_penalty"].least, le=_IN["repetition_penalty"].most
    )
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_TOKENS)] | None = None

    def fields(self) -> dict[str, Any]:
        """Values of the streaming model's tensors (see triton_fields) that are given, without prompt and seed."""
        values = {
            name: getattr(self, name)
            for name in (
                *("max_tokens", "temperature", "top_p", "min_tokens", "frequency_penalty", "presence_penalty", "stop"),
                *("repetition_penalty", "ignore_eos", "stop_token_ids"),
            )
        }
        values["top_k"] = None if self.top_k is None else max(0, self.top_k)
        return {name: value for name, value in values.items() if value is not None}

    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Messages
    tools: Tools | None = None
    max_completion_tokens: Whole | None = Field(None, ge=1, le=_TOKEN_BITS)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return read_chat(read_object(given, (*cls.model_fields, "tool_choice", "parallel_tool_calls")))

    def fields(self) -> dict[str, Any]:
        """As of both, with the newer name of max_tokens."""
        newer = self.max_completion_tokens
        return super().fields() | ({} if newer is None else {"max_tokens": newer})


class CompletionRequest(_Request):
    """POST /v1/completions."""

    default_tokens: ClassVar[int | None] = 16  # OpenAI's

    prompt: Prompts


class Usage(BaseModel):
    """Tokens of a request and its answers."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


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
