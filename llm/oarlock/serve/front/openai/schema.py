"""Requests and responses of the OpenAI API that a model of text can answer (pydantic models, for FastAPI)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model, model_validator

from oarlock.sampling.params import (
    MAX_STOP_LENGTH,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    OPTIONS,
    SamplingOption,
    SamplingParams,
)
from oarlock.serve.front.openai.request_reading import read_chat, read_object, read_prompts, read_stops
from oarlock.serve.request import GenerationRequest, Prompt

_COMPLETION_TOKENS = 16  # OpenAI's default length of a completion
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


def _read_whole(value: Any) -> Any:
    """Read a whole number. JSON has one kind of number: 2.0 is 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_read_whole)]
Token = Annotated[Whole, Field(ge=0, le=_TOKEN_BITS)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(read_stops),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}]}),
]
StopTokens = Annotated[list[Token], Field(max_length=MAX_STOP_TOKENS)]
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
    """An object whose types are strict ("1" is not a number, 1 is not true), and whose empty fields are absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    path: ClassVar[str] = ""  # in a request

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return read_object(given, cls.model_fields, cls.path)


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    path: ClassVar[str] = "stream_options"

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Accepted; nothing is obfuscated here.")


def _make_field(option: SamplingOption) -> tuple[Any, Any]:
    """Make the type and constraints of a sampling parameter, for pydantic."""
    if option.is_list:
        return (Stops if option.kind is str else StopTokens) | None, None
    if option.openai is None:
        return option.kind | None, None
    allowed = option.openai_range
    bounds: dict[str, Any] = {"gt" if allowed.excludes_least else "ge": allowed.least, "le": allowed.most}
    return (Whole if allowed.is_whole else option.kind) | None, Field(None, description=option.openai.words, **bounds)


_FIELDS: dict[str, Any] = {name: _make_field(option) for name, option in OPTIONS.items()}
_SamplingFields: Any = create_model("_SamplingFields", __base__=_Strict, **_FIELDS)


class _Request(_SamplingFields):
    """The fields of both kinds of request. Those that OpenAI does not have are vLLM's."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Whole | None = Field(None, ge=1, le=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def read_sampling(self, temperature: float) -> SamplingParams:
        """Read the sampling parameters, with the model's temperature if the request sets none."""
        given = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        given = {"temperature": temperature} | given
        for name, value in given.items():
            if isinstance(value, list):
                given[name] = tuple(value)
            elif isinstance(value, float):  # as Triton's tensors have it: a tiny number becomes 0
                given[name] = float(np.float32(value))
        if "top_k" in given:
            given["top_k"] = max(0, given["top_k"])  # -1 is vLLM's word for all
        return SamplingParams(**given, given=frozenset(given))

    def _make_requests(
        self, prompts: Sequence[Prompt], temperature: float, default_tokens: int | None = None
    ) -> list[GenerationRequest]:
        """Make one request for each prompt and wanted answer. With a seed, each answer of a prompt has its own.

        Args:
            temperature: of requests that set none.
            default_tokens: longest answer if max_tokens is not set; None for as many as the limits allow.

        Raises:
            RequestRefused: when a value is out of its range as a number of 32 bits.
        """
        sampling = replace(self.read_sampling(temperature), default_tokens=default_tokens)
        requests = []
        for prompt in prompts:
            for i in range(self.n or 1):
                seed = None if sampling.seed is None else (sampling.seed + i + 2**63) % 2**64 - 2**63
                requests.append(GenerationRequest(prompt, replace(sampling, seed=seed)))
        requests[0].check()
        return requests

    @property
    def includes_usage(self) -> bool:
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

    def read_sampling(self, temperature: float) -> SamplingParams:
        """Read the sampling parameters. The newer name of max_tokens takes precedence."""
        sampling = super().read_sampling(temperature)
        newer = self.max_completion_tokens
        if newer is None:
            return sampling
        return replace(sampling, max_tokens=newer, given=(sampling.given or frozenset()) | {"max_tokens"})

    def make_requests(self, temperature: float, adapter: str | None) -> list[GenerationRequest]:
        """Make one request to the engine for each wanted answer."""
        return self._make_requests([Prompt(messages=self.messages, tools=self.tools, adapter=adapter)], temperature)


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Prompts

    def make_requests(self, temperature: float, adapter: str | None) -> list[GenerationRequest]:
        """Make one request to the engine for each prompt and wanted answer."""
        prompts = [
            Prompt(text=prompt, adapter=adapter)
            if isinstance(prompt, str)
            else Prompt(token_ids=prompt, adapter=adapter)
            for prompt in self.prompt
        ]
        return self._make_requests(prompts, temperature, _COMPLETION_TOKENS)


class Usage(BaseModel):
    """Tokens of a request and its answers."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class AnswerMessage(BaseModel):
    """The message of the model."""

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
    """A model: the base, or an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "oarlock"


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """The error of a request."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class ErrorResponse(BaseModel):
    """The answer to a request that failed."""

    error: ErrorBody


class Health(BaseModel):
    """The answer to GET /health."""

    status: Literal["ok"] = "ok"
