"""Parsed fine-tuning records, and the fields they are read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oarlock.data.records.messages import Message

SYSTEM = ("system", "system_prompt", "system_message")
QUESTIONS = ("question", "prompt", "query", "input")
ANSWERS = ("answer", "completion", "response", "output")
MORE = ("input", "context")


@dataclass(frozen=True)
class Conversation:
    """Messages ({"role": system|user|assistant|tool, "content": text}, ...), the last of which is an assistant's.

    The user message of an Alpaca record also has "instruction" and "input", for the alpaca template.

    Attributes:
        where: file:line.
        not_trained: indices of assistant messages that are not trained on.
        unanswered: whether a last question without an answer was dropped.
        tools: descriptions of functions that the assistant may call.
        variables: template variables (the record's chat_template_kwargs).
    """

    messages: list[Message]
    where: str
    not_trained: frozenset[int] = frozenset()
    unanswered: bool = False
    tools: list[Message] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """Text that is trained on completely. A long text comes in several parts; `ends` marks the last one."""

    text: str
    where: str
    ends: bool = True


def read_text_field(item: dict[str, Any], name: str, required: bool = True, within: str = "") -> str:
    """Return the text of a field, or "" if it is optional and absent.

    Raises:
        ValueError: for any other value, with the field.
    """
    value = item.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        got = f"holds {type(value).__name__}" if name in item else "is missing"
        raise ValueError(f"field {within + name!r} {got}, expected a string")
    return value


def choose_field(item: dict[str, Any], names: Sequence[str]) -> str:
    """Return the one of several names that a record has, or the first if it has none.

    Raises:
        ValueError: if it has several with different values.
    """
    have = [name for name in names if item.get(name) not in (None, "")]
    if len(have) > 1 and any(item[name] != item[have[0]] for name in have):
        raise ValueError(
            f"fields {' and '.join(map(repr, have))} both look like the {_FIELD_TITLES[tuple(names)]}; "
            "choose one with --columns, or remove one"
        )
    return next((name for name in (*have, *(n for n in names if item.get(n) is not None))), names[0])


_FIELD_TITLES = {
    SYSTEM: "system prompt",
    QUESTIONS[:3]: "question",
    QUESTIONS: "question",
    ANSWERS: "answer",
    ANSWERS[::-1]: "answer",
    MORE: "input",
}


def require_answer(text: str) -> str:
    """Return the text of an answer, which must not be empty."""
    if not text.strip():
        raise ValueError("the answer is empty: there is nothing to train on")
    return text


def make_system_messages(item: dict[str, Any]) -> list[Message]:
    """Return the system message of a record as a list, empty if it has none."""
    text = read_text_field(item, choose_field(item, SYSTEM), required=False)
    return [{"role": "system", "content": text}] if text else []
