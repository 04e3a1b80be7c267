"""Records that are lists of messages: ShareGPT's and OpenAI's, whose names of fields and roles data mixes."""

from __future__ import annotations

from typing import Any

from oarlock.data.files.json_text import parse_line
from oarlock.data.records.fields import Conversation, answer_text, system_of, text_in
from oarlock.data.records.messages import CHAT_ROLES, Message, MessageError, normalize_message, text_of
from oarlock.data.records.training_marks import not_trained

ROLES = {
    **CHAT_ROLES,
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
# Turns that hold a call and nothing else, as JSON text.
_CALLS = ("function_call", "tool_call")


def from_chat(item: dict[str, Any], list_field: str, where: str) -> Conversation:
    """The conversation in a list of messages.

    Raises:
        ValueError: naming the message and field that is wrong.
    """
    rows = item.get(list_field)
    if not isinstance(rows, list) or not rows:
        got = f"holds {type(rows).__name__}" if list_field in item else "is missing"
        raise ValueError(f"field {list_field!r} {got}, expected a list of messages with at least one")
    messages: list[Message] = []
    marks: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        message = _message(row, f"{list_field}[{i}]")
        if _is_call(row) and i and _is_call(rows[i - 1]):  # several calls at once
            messages[-1]["tool_calls"] += message["tool_calls"]
            marks[-1] = {**marks[-1], **row}
        else:
            messages.append(message)
            marks.append(row)
    system = system_of(item)
    if system and messages[0]["role"] == "system" and system[0]["content"] != messages[0]["content"]:
        raise ValueError(f"field 'system' and {list_field}[0] hold two system texts")
    if system and messages[0]["role"] != "system":
        messages, marks = [*system, *messages], [{}, *marks]
        if any(isinstance(item.get(name), list) for name in ("loss_mask", "train_mask", "train_on_turn")):
            raise ValueError(f"a list of marks does not count the text of 'system'; put it into {list_field!r}")
    answers = [message["role"] == "assistant" for message in messages]
    if not any(answers):
        raise ValueError(f"field {list_field!r} has no assistant message: there is nothing to train on")
    read = frozenset(not_trained(item, marks, answers, list_field))
    last = max(i for i, answer in enumerate(answers) if answer)
    return Conversation(messages[: last + 1], where, read, unanswered=last + 1 < len(messages))


def _is_call(row: dict[str, Any]) -> bool:
    return (row.get("from") or row.get("role")) in _CALLS


def _message(row: Any, within: str) -> Message:
    if not isinstance(row, dict):
        raise ValueError(f"field {within!r} holds {type(row).__name__}, expected an object")
    role_field = "from" if row.get("from") is not None else "role"
    text_field = "value" if row.get("value") is not None else "content"
    role = text_in(row, role_field, within=f"{within}.")
    if role not in ROLES and role not in _CALLS:
        known = ", ".join((*ROLES, *_CALLS))
        raise ValueError(f"field '{within}.{role_field}' is {role!r}; known roles are {known}")
    given = {name: value for name, value in row.items() if name not in ("from", "value")}
    if role in _CALLS:
        return normalize_message(
            {**given, "role": "assistant", "content": None, "tool_calls": _calls_in(row, text_field, within)}, within
        )
    if text_field == "value":
        given["content"] = text_of(row["value"], f"{within}.value")
    message = normalize_message({**given, "role": ROLES[role]}, within)
    if message["role"] == "assistant" and not message.get("tool_calls") and not message.get("reasoning_content"):
        answer_text(message["content"])
    return message


def _calls_in(row: dict[str, Any], text_field: str, within: str) -> list[Any]:
    """Calls in the text of a turn: {"name": ..., "arguments": ...}, or a list of them."""
    text = row.get(text_field)
    try:
        calls = parse_line(text) if isinstance(text, str) else text
    except ValueError as error:
        raise MessageError(f"field '{within}.{text_field}' is not the JSON of a call: {error}") from error
    return calls if isinstance(calls, list) else [calls]
