"""Messages as people and clients send them -> messages as chat templates expect them.

What transformers' templates read: role, content, tool_calls (with arguments as objects), tool_call_id, name,
reasoning_content; fields that are null are absent. OpenAI's older names (functions, function_call) become the newer.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from oarlock.data.files.json_text import Unusable, parse_line
from oarlock.errors import DataError

Message = dict[str, Any]

# Roles of OpenAI's messages -> those that templates know.
CHAT_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
# Names of what a model thought before it answered; templates read the first, and older ones the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


class MessageError(DataError, ValueError):
    """A message that no template can be given; names messages[i].field."""


def normalize_messages(messages: Any, within: str = "messages") -> list[Message]:
    """Messages for a template; the given ones are not changed.

    Raises:
        MessageError: naming the message and field, and what was expected there.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise MessageError(f"field {within!r} must be a list of messages with at least one")
    return [normalize_message(message, f"{within}[{i}]") for i, message in enumerate(messages)]


def normalize_message(message: Any, within: str) -> Message:
    """One message; see normalize_messages."""
    if not isinstance(message, dict):
        raise MessageError(f"field {within!r} holds {type(message).__name__}, expected an object")
    given = {name: value for name, value in message.items() if value is not None}
    given["role"] = _role(given, within)
    calls = _calls(given, within)
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
        given["content"] = text_of(given["content"], f"{within}.content")
    elif not (calls and given["role"] == "assistant"):
        got = "holds NoneType" if "content" in message else "is missing"
        raise MessageError(f"field '{within}.content' {got}, expected a string")
    return given


def _role(message: Message, within: str) -> str:
    role = message.get("role")
    if not isinstance(role, str):
        got = f"holds {type(role).__name__}" if role is not None else "is missing"
        raise MessageError(f"field '{within}.role' {got}, expected a string")
    if role not in CHAT_ROLES:
        near = difflib.get_close_matches(role.lower(), CHAT_ROLES, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise MessageError(f"field '{within}.role' is {role!r}{hint}; known roles are {', '.join(CHAT_ROLES)}")
    return CHAT_ROLES[role]


def text_of(content: Any, within: str) -> str:
    """Content that is text, or OpenAI's parts: [{"type": "text", "text": ...}, ...].

    Raises:
        MessageError: for anything else.
    """
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise MessageError(f"field {within!r} holds parts that are not text")
        return "".join(map(str, parts))
    if not isinstance(content, str):
        raise MessageError(f"field {within!r} holds {type(content).__name__}, expected a string")
    return content


def _calls(message: Message, within: str) -> list[Message]:
    """A message's tool calls in the newer form; function_call is taken out of it, and an empty list too."""
    calls, old = message.pop("tool_calls", None) or [], message.pop("function_call", None)
    if not isinstance(calls, list):
        raise MessageError(f"field '{within}.tool_calls' holds {type(calls).__name__}, expected a list")
    if (calls or old) and message["role"] != "assistant":
        raise MessageError(f"field '{within}' holds tool calls, but only an assistant calls tools")
    found = [_call(call, f"{within}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if old:
        found.append(_call(old, f"{within}.function_call"))
    return found


def _call(call: Any, within: str) -> Message:
    if not isinstance(call, dict):
        raise MessageError(f"field {within!r} holds {type(call).__name__}, expected an object")
    call = {name: value for name, value in call.items() if value is not None}
    bare = "function" not in call
    function, inside = (call, within) if bare else (call["function"], f"{within}.function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise MessageError(f"field '{inside}' must hold the name of what is called")
    arguments = parse_object(function.get("arguments"), f"{inside}.arguments")
    if bare:
        rest = {name: value for name, value in call.items() if name in ("id", "index")}
        return {"type": "function", **rest, "function": {"name": call["name"], "arguments": arguments}}
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _parsed(value: Any, within: str) -> Any:
    """A value, or what its JSON text says."""
    if not (isinstance(value, str) and value.strip()):
        return value
    try:
        return parse_line(value)
    except ValueError as error:
        raise MessageError(f"field {within!r}{': ' if isinstance(error, Unusable) else ' is '}{error}") from error


def parse_object(value: Any, within: str) -> dict[str, Any]:
    """An object, or its JSON text; nothing is an empty one.

    Raises:
        MessageError: for anything else.
    """
    value = _parsed(value, within)
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise MessageError(f"field {within!r} holds {type(value).__name__}, expected an object or its JSON text")
    return value


def normalize_tools(tools: Any, within: str = "tools") -> list[Message] | None:
    """Descriptions of functions in OpenAI's newer form, or None where there are none.

    Args:
        tools: a list, also as JSON text; a description of a function without {"type": "function"} around it gets it.

    Raises:
        MessageError: naming the entry.
    """
    tools = _parsed(tools, within)
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
