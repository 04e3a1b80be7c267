"""Parsing records that are lists of messages (ShareGPT and OpenAI). Datasets mix their field and role names."""

from __future__ import annotations

from typing import Any

from oarlock.data.files.json_text import parse_line
from oarlock.data.records.fields import Conversation, make_system_messages, read_text_field, require_answer
from oarlock.data.records.messages import CHAT_ROLES, Message, MessageError, join_text_parts, normalize_message
from oarlock.data.records.training_marks import find_untrained

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
# Roles of messages that contain only tool calls, as JSON text.
_CALLS = ("function_call", "tool_call")


def parse_chat(item: dict[str, Any], list_field: str, where: str) -> Conversation:
    """Parse the conversation in a list of messages.

    Raises:
        ValueError: with the invalid message and field.
    """
    rows = item.get(list_field)
    if not isinstance(rows, list) or not rows:
        got = f"holds {type(rows).__name__}" if list_field in item else "is missing"
        raise ValueError(f"field {list_field!r} {got}, expected a non-empty list of messages")
    messages: list[Message] = []
    marks: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        message = _parse_message(row, f"{list_field}[{i}]")
        if _is_call(row) and i and _is_call(rows[i - 1]):  # parallel calls
            messages[-1]["tool_calls"] += message["tool_calls"]
            marks[-1] = {**marks[-1], **row}
        else:
            messages.append(message)
            marks.append(row)
    system = make_system_messages(item)
    if system and messages[0]["role"] == "system" and system[0]["content"] != messages[0]["content"]:
        raise ValueError(f"field 'system' and {list_field}[0] hold different system prompts")
    if system and messages[0]["role"] != "system":
        messages, marks = [*system, *messages], [{}, *marks]
        if any(isinstance(item.get(name), list) for name in ("loss_mask", "train_mask", "train_on_turn")):
            raise ValueError(f"a list of marks has no entry for 'system'; move its text to {list_field!r}")
    answers = [message["role"] == "assistant" for message in messages]
    if not any(answers):
        raise ValueError(f"field {list_field!r} has no assistant message: there is nothing to train on")
    read = frozenset(find_untrained(item, marks, answers, list_field))
    last = max(i for i, answer in enumerate(answers) if answer)
    return Conversation(messages[: last + 1], where, read, unanswered=last + 1 < len(messages))


def _is_call(row: dict[str, Any]) -> bool:
    return (row.get("from") or row.get("role")) in _CALLS


def _parse_message(row: Any, within: str) -> Message:
    if not isinstance(row, dict):
        raise ValueError(f"field {within!r} holds {type(row).__name__}, expected an object")
    role_field = "from" if row.get("from") is not None else "role"
    text_field = "value" if row.get("value") is not None else "content"
    role = read_text_field(row, role_field, within=f"{within}.")
    if role not in ROLES and role not in _CALLS:
        known = ", ".join((*ROLES, *_CALLS))
        raise ValueError(f"field '{within}.{role_field}' is {role!r}; known roles are {known}")
    given = {name: value for name, value in row.items() if name not in ("from", "value")}
    if role in _CALLS:  # {"name": ..., "arguments": ...}, or a list of them
        try:
            calls = parse_line(row[text_field]) if isinstance(row.get(text_field), str) else row.get(text_field)
        except ValueError as error:
            raise MessageError(f"field '{within}.{text_field}' is not a tool call in JSON: {error}") from error
        calls = calls if isinstance(calls, list) else [calls]
        return normalize_message({**given, "role": "assistant", "content": None, "tool_calls": calls}, within)
    if text_field == "value":
        given["content"] = join_text_parts(row["value"], f"{within}.value")
    message = normalize_message({**given, "role": ROLES[role]}, within)
    if message["role"] == "assistant" and not message.get("tool_calls") and not message.get("reasoning_content"):
        require_answer(message["content"])
    return message
