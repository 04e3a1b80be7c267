"""Fine-tuning records as people have them -> conversations, or plain text.

Forms: src/tgt (strings, or lists of equal length for several rounds), Alpaca (instruction, input, output), ShareGPT
(conversations of from/value), OpenAI messages (role/content), and plain text (text). Every record knows its file:line,
so that a wrong one can be named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


@dataclass(frozen=True)
class Conversation:
    """Messages ({"role": system|user|assistant, "content": text}, ...) that end with an assistant's.

    An Alpaca user message also holds "instruction" and "input", which the alpaca template puts in their places.

    Attributes:
        where: file:line.
        not_trained: positions of assistant messages that are read only (OpenAI's "weight": 0).
        unanswered: whether a question without an answer followed and was left out.
    """

    messages: list[Message]
    where: str
    not_trained: frozenset[int] = frozenset()
    unanswered: bool = False


@dataclass(frozen=True)
class PlainText:
    """Text that is trained on whole; a long one comes in pieces, the last of which ends it."""

    text: str
    where: str
    ends: bool = True


def parse_record(item: Any, form: str, where: str) -> Conversation | PlainText:
    """A record of a known form.

    Raises:
        ValueError: naming the field and what was expected there.
    """
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, got {type(item).__name__}")
    return _FORMS[form](item, where)


def detect_form(item: Any) -> str:
    """The form of a record, by its fields.

    Raises:
        ValueError: listing the fields it has and the forms that are known.
    """
    if isinstance(item, dict):
        for form, fields in _FIELDS.items():
            if all(item.get(name) is not None for name in fields):
                return form
    have = ", ".join(map(repr, list(item)[:8])) if isinstance(item, dict) else type(item).__name__
    raise ValueError(f"unknown form of record ({have}); known are {_known()}")


def _known() -> str:
    return ", ".join(f"{'/'.join(fields)} ({form})" for form, fields in _FIELDS.items())


def _text(item: dict[str, Any], name: str, required: bool = True, within: str = "") -> str:
    value = item.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        got = f"holds {type(value).__name__}" if name in item else "is missing"
        raise ValueError(f"field {within + name!r} {got}, expected text")
    return value


def _answer(text: str) -> str:
    if not text.strip():
        raise ValueError("the answer is empty: there is nothing to train on")
    return text


def _system(item: dict[str, Any]) -> list[Message]:
    text = _text(item, "system", required=False)
    return [{"role": "system", "content": text}] if text else []


def _from_src_tgt(item: dict[str, Any], where: str) -> Conversation:
    sides = []
    for name in ("src", "tgt"):
        value = item.get(name)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            sides.append(value)
        elif isinstance(value, list):
            raise ValueError(f"field {name!r} must be text or a list of texts with at least one")
        else:
            sides.append([_text(item, name)])
    sources, targets = sides
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} rounds in 'src' but {len(targets)} in 'tgt'")
    messages = _system(item)
    for source, target in zip(sources, targets, strict=True):
        messages += [{"role": "user", "content": source}, {"role": "assistant", "content": _answer(target)}]
    return Conversation(messages, where)


def _from_alpaca(item: dict[str, Any], where: str) -> Conversation:
    instruction, more = _text(item, "instruction"), _text(item, "input", required=False)
    content = f"{instruction}\n{more}" if more else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": more}
    answer = {"role": "assistant", "content": _answer(_text(item, "output"))}
    return Conversation([*_system(item), *_history(item), user, answer], where)


def _history(item: dict[str, Any]) -> list[Message]:
    """Earlier rounds of an Alpaca record: [[question, answer], ...]."""
    rounds = item.get("history") or []
    messages: list[Message] = []
    for i, pair in enumerate(rounds if isinstance(rounds, list) else [None]):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"field 'history[{i}]' must be a pair of texts (question, answer)")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": _answer(pair[1])}]
    return messages


def _chat(list_field: str) -> Callable[[dict[str, Any], str], Conversation]:
    """ShareGPT and OpenAI messages: they differ in the names of fields and roles, and data mixes those."""

    def parse(item: dict[str, Any], where: str) -> Conversation:
        rows = item.get(list_field)
        if not isinstance(rows, list) or not rows:
            got = f"holds {type(rows).__name__}" if list_field in item else "is missing"
            raise ValueError(f"field {list_field!r} {got}, expected a list of messages with at least one")
        messages = [_message(row, f"{list_field}[{i}]") for i, row in enumerate(rows)]
        if messages[0]["role"] != "system":
            messages, rows = [*_system(item), *messages], [{}] * len(_system(item)) + rows
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise ValueError(f"field {list_field!r} has no assistant message: there is nothing to train on")
        not_trained = frozenset(i for i, row in enumerate(rows) if row.get("weight") == 0)
        return Conversation(messages[: last + 1], where, not_trained, unanswered=last + 1 < len(messages))

    return parse


def _message(row: Any, within: str) -> Message:
    if not isinstance(row, dict):
        raise ValueError(f"field {within!r} holds {type(row).__name__}, expected an object")
    role_field = "from" if row.get("from") is not None else "role"
    text_field = "value" if row.get("value") is not None else "content"
    role = _text(row, role_field, within=f"{within}.")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(f"field '{within}.{role_field}' is {role!r}; known roles are {known} (no tool calls)")
    content = row.get(text_field)
    if isinstance(content, list):  # OpenAI's parts: [{"type": "text", "text": ...}, ...]
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"field '{within}.{text_field}' holds parts that are not text")
        content = "".join(map(str, parts))
    elif not isinstance(content, str):
        content = _text(row, text_field, within=f"{within}.")
    return {"role": ROLES[role], "content": _answer(content) if ROLES[role] == "assistant" else content}


def _from_text(item: dict[str, Any], where: str) -> PlainText:
    text = _text(item, "text")
    if not text.strip():
        raise ValueError("field 'text' is empty: there is nothing to train on")
    return PlainText(text, where)


_FORMS: dict[str, Callable[[dict[str, Any], str], Conversation | PlainText]] = {
    "src_tgt": _from_src_tgt,
    "alpaca": _from_alpaca,
    "sharegpt": _chat("conversations"),
    "messages": _chat("messages"),
    "text": _from_text,
}
# By which fields a form is told; the first that fits.
_FIELDS: dict[str, tuple[str, ...]] = {
    "src_tgt": ("src", "tgt"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "text": ("text",),
}
