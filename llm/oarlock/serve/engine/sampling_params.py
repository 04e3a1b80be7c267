"""What a caller asks of the engine, and what comes back. Does not import paddle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from oarlock.errors import OarlockError
from oarlock.model_config.sampling_ranges import MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_STOPS, RANGES

_MAY_BE_NONE = ("max_tokens", "default_tokens", "seed")
_MAX_SHOWN = 200  # characters of a wrong value in a refusal
FinishReason = Literal["stop", "length", "cancelled", "error"]


class RequestRefused(OarlockError):
    """The caller asked for what can't be: a bad prompt, too many tokens, an adapter that is not here."""


class PromptTooLong(RequestRefused):
    """A prompt that leaves no room for an answer."""


class QueueFull(OarlockError):
    """As many requests wait as may, or the engine is closing: try again later."""


@dataclass(frozen=True)
class Limits:
    """What the engine gives at most.

    Attributes:
        max_batch: requests that are answered at a time; the others wait.
        max_length: tokens of a prompt and its answer together; None for the model's context.
        max_queue: requests that may wait.
        max_tokens: of an answer.
        seconds: from the call of submit() to the last token.
    """

    max_batch: int = 16
    max_length: int | None = None
    max_queue: int = 256
    max_tokens: int = 4096
    seconds: float = 600.0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when an answer ends.

    The order is: repetition, frequency and presence penalties, temperature, top_k, top_p, as in the samplers of
    Hugging Face and vLLM.

    Attributes:
        max_tokens: of the answer; None for as many as the context and the limits allow.
        default_tokens: of an answer without max_tokens, where the context and the limits allow as many.
        min_tokens: before which nothing ends it.
        temperature: of the distribution; 0 takes the likeliest token (greedy).
        top_p: mass of the likeliest tokens that are kept (at least one), in (0, 1].
        top_k: how many of the likeliest tokens are kept; 0 for all.
        repetition_penalty: divides positive and multiplies negative scores of what is in prompt or answer
            (arXiv 1909.05858).
        frequency_penalty: is subtracted from a token's score for each time that the answer has it.
        presence_penalty: is subtracted once when the answer has it.
        seed: the same gives the same answer, whatever else is in the batch; None draws one.
        stop: texts that end the answer, they and what follows left out.
        stop_token_ids: tokens that do, beside the model's own.
        ignore_eos: go on after the model's own.
        given: names of the fields that the caller chose; the others are as the model's generation_config.json says.
            None where all of them are.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    default_tokens: int | None = None
    given: frozenset[str] | None = None

    def with_defaults(self, defaults: Mapping[str, float | int]) -> Sampling:
        """With a model's own values for what the caller did not choose."""
        given = self.given
        if given is None:
            return self
        own: dict[str, Any] = {name: value for name, value in defaults.items() if name not in given}
        return replace(self, **own)

    def check(self) -> None:
        """Refuse values outside of their ranges.

        Raises:
            RequestRefused: naming the field and what it may be.
        """
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not allowed.is_number(value):
                kind = "whole" if allowed.is_whole else "finite"
                raise RequestRefused(f"{name} has to be a {kind} number; got {_shown(value)}")
            if not allowed.holds(value):
                raise RequestRefused(f"{name} has to be {allowed.words}; got {_shown(value)}")
        if not (_all_of(self.stop, str) and all(self.stop)):
            raise RequestRefused(f"stop has to be a list of texts that are not empty; got {_shown(self.stop)}")
        if not _all_of(self.stop_token_ids, int):
            raise RequestRefused(f"stop_token_ids has to be a list of token ids; got {_shown(self.stop_token_ids)}")
        if len(self.stop) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in self.stop):
            raise RequestRefused(f"stop: at most {MAX_STOPS} texts of at most {MAX_STOP_LENGTH} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise RequestRefused(f"stop_token_ids: at most {MAX_STOP_TOKENS}")


@dataclass(frozen=True)
class Prompt:
    """What is asked: exactly one of the first three.

    Attributes:
        text: as it is; the tokenizer adds what it puts before a text.
        messages: of a chat, {"role": ..., "content": ...}; the model's chat template makes the text of them.
        tools: descriptions of functions in OpenAI's form, for the template, beside messages.
        token_ids: as they are.
        adapter: its name; None for the base.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    adapter: str | None = None
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        """Refuse anything but one well-formed form.

        Raises:
            RequestRefused: saying what is wrong.
        """
        given = [name for name in ("text", "messages", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestRefused(f"give one of text, messages and token_ids; got {', '.join(given) or 'none'}")
        if self.text is not None and not isinstance(self.text, str):
            raise RequestRefused(f"text has to be a text; got {type(self.text).__name__}")
        if self.tools is not None and self.messages is None:
            raise RequestRefused("tools go with messages")
        if self.token_ids is not None and not _all_of(self.token_ids, int):
            raise RequestRefused("token_ids have to be whole numbers")


def _shown(value: Any) -> str:
    """A client's own value, which may be of any length."""
    if isinstance(value, int) and abs(value) >= 1 << 256:
        return "a number of more than 256 bits"  # which Python takes long to write
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _all_of(values: Any, kind: type) -> bool:
    """Whether it is a list or tuple of such values (a bool is no int here)."""
    return isinstance(values, (list, tuple)) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


@dataclass(frozen=True)
class Piece:
    """A part of an answer, in order.

    Attributes:
        text: that is new; empty while it may be the beginning of a stop text or of a character.
        token_ids: that are new; the one that ended the answer is left out.
        index: counts the pieces of an answer from 0.
        finish_reason: None but for the last piece: "stop" (the model's end, or a stop text), "length", "cancelled",
            "error".
        prompt_tokens: of the whole prompt.
        completion_tokens: so far.
        error: what went wrong, for people.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    error: str = ""


@dataclass
class Answer:
    """Pieces put together.

    Attributes:
        text, token_ids: whole.
        finish_reason: None as long as the last piece is not there.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    def add(self, piece: Piece) -> None:
        """The next one."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.finish_reason, self.error = piece.finish_reason, piece.error
        self.prompt_tokens, self.completion_tokens = piece.prompt_tokens, piece.completion_tokens
