"""Converting messages of users and clients to those that chat templates expect.

The templates of transformers read role, content, tool_calls (with arguments as objects), tool_call_id, name and
reasoning_content. Null fields are dropped. OpenAI's older names (functions, function_call) are converted.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from oarlock.data.files.json_text import Unusable, parse_line
from oarlock.errors import DataError

Message = dict[str, Any]

# Roles of OpenAI's messages -> roles of chat templates.
CHAT_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
# Names of the field with the reasoning. Templates read the first; older ones read the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


class MessageError(DataError, ValueError):
    """An invalid message. The text names messages[i].field."""


def normalize_messages(messages: Any, within: str = "messages") -> list[Message]:
    """Convert messages for a template. The originals are not changed.

    Raises:
        MessageError: with the message, the field, and what was expected.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise MessageError(f"field {within!r} must be a non-empty list of messages")
    return [normalize_message(message, f"{within}[{i}]") for i, message in enumerate(messages)]


def normalize_message(message: Any, within: str) -> Message:
    """Convert one message for a template."""
    if not isinstance(message, dict):
        raise MessageError(f"field {within!r} holds {type(message).__name__}, expected an object")
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str):
        got = f"holds {type(role).__name__}" if role is not None else "is missing"
        raise MessageError(f"field '{within}.role' {got}, expected a string")
    if role not in CHAT_ROLES:
        near = difflib.get_close_matches(role.lower(), CHAT_ROLES, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise MessageError(f"field '{within}.role' is {role!r}{hint}; known roles are {', '.join(CHAT_ROLES)}")
    given["role"] = CHAT_ROLES[role]
    listed, old_call = given.pop("tool_calls", None) or [], given.pop("function_call", None)
    if not isinstance(listed, list):
        raise MessageError(f"field '{within}.tool_calls' holds {type(listed).__name__}, expected a list")
    if (listed or old_call) and given["role"] != "assistant":
        raise MessageError(f"field '{within}' has tool calls, but only an assistant calls tools")
    calls = [_normalize_call(call, f"{within}.tool_calls[{i}]") for i, call in enumerate(listed)]
    if old_call:
        calls.append(_normalize_call(old_call, f"{within}.function_call"))
    if calls:
        given["tool_calls"] = calls
    reasoning = next((name for name in REASONING if name in given), None)
    if reasoning is not None:
        if not isinstance(given[reasoning], str):
            raise MessageError(
                f"field '{within}.{reasoning}' holds {type(given[reasoning]).__name__}, expected a string"
            )
        given = {"thinking": given[reasoning], **given, "reasoning_content": given[reasoning]}
    if "content" in given:
        given["content"] = join_text_parts(given["content"], f"{within}.content")
    elif not (calls and given["role"] == "assistant"):
        got = "is null" if "content" in message else "is missing"
        raise MessageError(f"field '{within}.content' {got}, expected a string")
    return given


def join_text_parts(content: Any, within: str) -> str:
    """Return the text of a content: a string, or OpenAI's parts [{"type": "text", "text": ...}, ...].

    Raises:
        MessageError: for anything else.
    """
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise MessageError(f"field {within!r} has parts that are not text")
        return "".join(map(str, parts))
    if not isinstance(content, str):
        raise MessageError(f"field {within!r} holds {type(content).__name__}, expected a string")
    return content


def _normalize_call(call: Any, within: str) -> Message:
    if not isinstance(call, dict):
        raise MessageError(f"field {within!r} holds {type(call).__name__}, expected an object")
    call = {name: value for name, value in call.items() if value is not None}
    bare = "function" not in call
    function, inside = (call, within) if bare else (call["function"], f"{within}.function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise MessageError(f"field '{inside}' must have the name of the function")
    arguments = _parse_json_text(function.get("arguments"), f"{inside}.arguments")
    arguments = {} if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, dict):
        raise MessageError(
            f"field '{inside}.arguments' holds {type(arguments).__name__}, expected an object or its JSON text"
        )
    if bare:
        rest = {name: value for name, value in call.items() if name in ("id", "index")}
        return {"type": "function", **rest, "function": {"name": call["name"], "arguments": arguments}}
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _parse_json_text(value: Any, within: str) -> Any:
    """Return a value, parsed if it is JSON text."""
    if not (isinstance(value, str) and value.strip()):
        return value
    try:
        return parse_line(value)
    except ValueError as error:
        raise MessageError(f"field {within!r}{': ' if isinstance(error, Unusable) else ' is '}{error}") from error


def normalize_tools(tools: Any, within: str = "tools") -> list[Message] | None:
    """Return function descriptions in OpenAI's newer form, or None if there are none.

    Args:
        tools: a list, or its JSON text. Functions without {"type": "function"} around them are wrapped.

    Raises:
        MessageError: with the invalid entry.
    """
    tools = _parse_json_text(tools, within)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise MessageError(f"field {within!r} holds {type(tools).__name__}, expected a list")
    found = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise MessageError(f"field '{within}[{i}]' holds {type(tool).__name__}, expected an object")
        bare = "function" not in tool and "type" not in tool and "name" in tool
        found.append({"type": "function", "function": tool} if bare else tool)
    return found
