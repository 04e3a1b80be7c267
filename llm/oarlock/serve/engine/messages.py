"""Reads the messages and tools of requests, and refuses by name what can't be put into a prompt.

What the model's chat template does not render is refused too, by data/templates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from oarlock.data.records.messages import REASONING, Message, MessageError, normalize_messages, normalize_tools
from oarlock.errors import RequestRefused

_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", *REASONING)
_NOT_READ = {
    "annotations": "annotations are not read here",
    "audio": "audio is not read here",
    "refusal": "send what the model said as content",
}
_MAX_NESTING = 64
# Fields that may be empty; other fields that are empty count as absent.
_EVEN_EMPTY = ("content", "role")


def read_messages(given: Any) -> list[Message]:
    """Read messages for a template, with the content of each as one text.

    Raises:
        RequestRefused: naming the message and field that can't be read.
    """
    if not isinstance(given, list) or not given:
        raise RequestRefused("messages must be a list of at least one message")
    messages = [_read_message(f"messages[{i}]", message) for i, message in enumerate(given)]
    try:
        read = normalize_messages(messages)
    except (MessageError, RecursionError) as error:
        raise RequestRefused(str(error)) from error
    for i, message in enumerate(read):
        _check_nesting(f"messages[{i}].tool_calls", message.get("tool_calls"))
    return read


def drop_empty(values: Mapping[str, Any], even_empty: Collection[str]) -> dict[str, Any]:
    """Copy an object without fields that are null or empty.

    Args:
        even_empty: fields whose empty values are kept.
    """
    return {
        name: value
        for name, value in values.items()
        if value is not None and (name in even_empty or value or not isinstance(value, (str, list, dict)))
    }


def _check_nesting(path: str, value: Any) -> None:
    """Limit the nesting of a value: templates render it recursively."""
    level = [value]
    for _ in range(_MAX_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RequestRefused(f"{path}: more than {_MAX_NESTING} objects in each other")


def _read_message(path: str, given: Any) -> Message:
    if not isinstance(given, Mapping):
        raise RequestRefused(f'{path} must be an object {{"role": ..., "content": ...}}')
    message = drop_empty(given, _EVEN_EMPTY)
    for name in message:
        if name in _NOT_READ:
            raise RequestRefused(f"{path}.{name}: {_NOT_READ[name]}")
        if name not in _FIELDS:
            raise RequestRefused(f"{path}.{name}: there is no such field here (there are: {', '.join(_FIELDS)})")
    content = message.get("content")
    calls = [name for name in ("tool_calls", "function_call") if name in message]
    if content is None and not calls:
        raise RequestRefused(f"{path}.content is missing: it must be a text or a list of parts")
    if isinstance(content, list) and content:
        message["content"] = "".join(_read_part(f"{path}.content[{i}]", part) for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise RequestRefused(f"{path}.content must be a text or a list of parts")
    if "name" in message and not isinstance(message["name"], str):
        raise RequestRefused(f"{path}.name must be a text")
    return message


def _read_part(path: str, given: Any) -> str:
    if not isinstance(given, Mapping):
        raise RequestRefused(f'{path} must be an object {{"type": "text", "text": ...}}')
    # OpenAI's mark for its cache does not change the answer.
    part = {name: value for name, value in given.items() if value is not None and name != "prompt_cache_breakpoint"}
    if part.get("type") != "text":
        kind = str(part.get("type"))[:64]
        raise RequestRefused(f"{path}.type must be 'text': parts of type {kind!r} are not read here")
    for name in part:
        if name not in ("type", "text"):
            raise RequestRefused(f"{path}.{name}: there is no such field here (there is: type, text)")
    if not isinstance(part.get("text"), str):
        raise RequestRefused(f"{path}.text must be a text")
    return str(part["text"])


def read_tools(given: Any) -> list[Message] | None:
    """Read descriptions of functions for the template; None for none.

    Raises:
        RequestRefused: naming the entry that is not a function, or asks for more than a description.
    """
    _check_nesting("tools", given)
    try:
        tools = normalize_tools(given)
    except MessageError as error:
        raise RequestRefused(str(error)) from error
    for i, tool in enumerate(tools or ()):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise RequestRefused(f'tools[{i}] must be {{"type": "function", "function": {{"name": ...}}}}')
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestRefused(f"tools[{i}].function.name must be a text")
        if function.get("strict"):
            raise RequestRefused(f"tools[{i}].function.strict: answers are not held to a schema here")
    return tools
