"""Messages and prompts of OpenAI's requests: content in parts becomes a text, what can't be read is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarlock.serve.openai_reading import WrongRequest, check_names, has_to_be, without_nothing
from oarlock.serve.requests import RequestRefused, check_messages

_KNOWN = ("role", "content", "name")
_NOT_READ = {
    "annotations": "notes beside a text are not read here",
    "audio": "answers in sound are not read here",
    "function_call": "calls of functions are not read here",
    "refusal": "send what the model said as content",
    "tool_call_id": "results of tools are not read here",
    "tool_calls": "calls of tools are not read here",
}
_MAX_PROMPTS = 16


def read_messages(given: Any) -> Any:
    """Messages as the engine takes them, each with its content in one text.

    Raises:
        WrongRequest: naming what can't be read.
    """
    if not isinstance(given, list) or not given:
        raise has_to_be("messages", "a list of at least one message", given)
    messages = [_read_message(f"messages[{i}]", message) for i, message in enumerate(given)]
    try:
        check_messages(messages)
    except RequestRefused as error:
        raise WrongRequest("messages", str(error)) from error
    return messages


def _read_message(path: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise has_to_be(path, 'an object {"role": ..., "content": ...}', given)
    message = without_nothing(given)
    for name, why in _NOT_READ.items():
        if name in message:
            raise WrongRequest(f"{path}.{name}", f"{path}.{name}: {why}")
    check_names(path, message, _KNOWN)
    content = message.get("content")
    if content is None:
        raise WrongRequest(f"{path}.content", f"{path}.content is missing: it has to be a text or a list of parts")
    if isinstance(content, list) and content:
        message["content"] = "".join(_read_part(f"{path}.content[{i}]", part) for i, part in enumerate(content))
    elif not isinstance(content, str):
        raise has_to_be(f"{path}.content", "a text or a list of parts", content)
    return message


def _read_part(path: str, given: Any) -> str:
    if not isinstance(given, Mapping):
        raise has_to_be(path, 'an object {"type": "text", "text": ...}', given)
    part = {name: value for name, value in given.items() if value is not None}
    kind = part.get("type")
    if kind != "text":
        raise has_to_be(f"{path}.type", '"text"', kind)
    part.pop("prompt_cache_breakpoint", None)  # OpenAI's, of no meaning for the answer
    check_names(path, part, ("type", "text"))
    if not isinstance(part.get("text"), str):
        raise has_to_be(f"{path}.text", "a text", part.get("text"))
    return str(part["text"])


def read_prompts(given: Any) -> list[Any]:
    """The prompts of a completion: texts and lists of token ids.

    Raises:
        WrongRequest: saying what a prompt may be.
    """
    if _is_prompt(given):
        return [given]
    if isinstance(given, list) and given and not isinstance(given[0], int):
        if len(given) > _MAX_PROMPTS:
            raise WrongRequest("prompt", f"prompt: {len(given)} prompts; at most {_MAX_PROMPTS} may be in one request")
        for i, one in enumerate(given):
            if not _is_prompt(one):
                raise has_to_be(f"prompt[{i}]", "a text that is not empty, or a list of token ids", one)
        return given
    raise has_to_be("prompt", "a text that is not empty, a list of token ids, or a list of these", given)


def _is_prompt(given: Any) -> bool:
    if isinstance(given, str):
        return bool(given)
    return isinstance(given, list) and bool(given) and all(type(token) is int and 0 <= token < 2**31 for token in given)


def read_stops(given: Any) -> Any:
    """Stop texts as a list."""
    return [given] if isinstance(given, str) else given
