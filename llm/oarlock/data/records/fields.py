"""Fields of fine-tuning records: what is read of them, under which names, and what they become."""

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
    """Messages ({"role": system|user|assistant|tool, "content": text}, ...) that end with an assistant's.

    An Alpaca user message also holds "instruction" and "input", which the alpaca template puts in their places.

    Attributes:
        where: file:line.
        not_trained: positions of assistant messages that are read only.
        unanswered: whether a question without an answer followed and was left out.
        tools: descriptions of functions that the assistant may call.
        variables: more that the template reads (the record's chat_template_kwargs).
    """

    messages: list[Message]
    where: str
    not_trained: frozenset[int] = frozenset()
    unanswered: bool = False
    tools: list[Message] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """Text that is trained on whole; a long one comes in pieces, the last of which ends it."""

    text: str
    where: str
    ends: bool = True


def text_in(item: dict[str, Any], name: str, required: bool = True, within: str = "") -> str:
    """The text of a field; "" where it is absent and need not be there.

    Raises:
        ValueError: naming the field and what it holds.
    """
    value = item.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        got = f"holds {type(value).__name__}" if name in item else "is missing"
        raise ValueError(f"field {within + name!r} {got}, expected a string")
    return value


def one_of(item: dict[str, Any], names: Sequence[str]) -> str:
    """Which of the names a record has; the first where it has none.

    Raises:
        ValueError: where it has several, and they differ.
    """
    have = [name for name in names if item.get(name) not in (None, "")]
    if len(have) > 1 and any(item[name] != item[have[0]] for name in have):
        raise ValueError(
            f"fields {' and '.join(map(repr, have))} both look like the {_MEANT[tuple(names)]}; "
            "say which one with --columns, or leave one out"
        )
    return next((name for name in (*have, *(n for n in names if item.get(n) is not None))), names[0])


_MEANT = {
    SYSTEM: "system text",
    QUESTIONS[:3]: "question",
    QUESTIONS: "question",
    ANSWERS: "answer",
    ANSWERS[::-1]: "answer",
    MORE: "input",
}


def answer_text(text: str) -> str:
    """The text itself, which may not be empty."""
    if not text.strip():
        raise ValueError("the answer is empty: there is nothing to train on")
    return text


def system_of(item: dict[str, Any]) -> list[Message]:
    """The message of a record's system text, if it has one."""
    text = text_in(item, one_of(item, SYSTEM), required=False)
    return [{"role": "system", "content": text}] if text else []
