"""Reads the JSON of OpenAI's requests: drops empty fields, and refuses by name what the server does not do.

Clients write every optional field (null, or an empty list), and send messages back as they got them. Such fields count
as absent. An error is one sentence that names the field, whatever pydantic calls it.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.message import Message
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from oarlock.errors import RequestRefused
from oarlock.formats.json_file import parse_json
from oarlock.serve.engine.messages import drop_empty, read_messages, read_tools

# Fields of OpenAI's and vLLM's requests that are not supported: why, and the values that ask for nothing.
_NOT_SUPPORTED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "add_generation_prompt": ("an answer always has a turn of its own", (True,)),
    "audio": ("answers are text", ()),
    "best_of": ("use n", (1,)),
    "continue_final_message": ("an answer always has a turn of its own", (False,)),
    "echo": ("the prompt is not repeated", (False,)),
    "function_call": ("the model is not made to call functions", ("none", "auto")),
    "functions": ("use tools", ()),
    "include_stop_str_in_output": ("nothing of a stop text is given", (False,)),
    "length_penalty": ("there is no beam search", (1, 1.0)),
    "logit_bias": ("logits can't be changed", ()),
    "logprobs": ("log probabilities are not given", (False,)),
    "min_p": ("use top_p or top_k", (0, 0.0)),
    "modalities": ("answers are text", (["text"],)),
    "moderation": ("nothing is moderated", ()),
    "prediction": ("answers are not predicted", ()),
    "reasoning_effort": ("the template decides whether a model reasons", ("none",)),
    "response_format": ("answers are plain text, not held to a form", ({"type": "text"},)),
    "service_tier": ("all requests are served alike", ("auto", "default")),
    "skip_special_tokens": ("special tokens are not shown", (True,)),
    "store": ("nothing is stored", (False,)),
    "suffix": ("text is not inserted", ()),
    "top_logprobs": ("log probabilities are not given", (0,)),
    "use_beam_search": ("there is no beam search", (False,)),
    "verbosity": ("say it in a message", ("medium",)),
    "web_search_options": ("nothing is searched", ()),
}
# Fields about the user, caching and billing, which do not change the answer.
_WITHOUT_EFFECT = (
    *("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    *("safety_identifier",),
)
_EVEN_EMPTY = ("messages", "model", "prompt", "content", "web_search_options")  # empty does not mean absent here
_MAX_PROMPTS = 16
_PARAM = re.compile(
    r"\b(?:messages(?:\[\d+\](?:\.\w+|\[\d+\])*)?|tools(?:\[\d+\](?:\.\w+)*)?|max_tokens|min_tokens|stop_token_ids)(?!\w)"
)
_LARGE = 65536  # bytes of a request
_MAX_DEPTH = 128  # levels of lists and objects; those of a tool are counted by themselves
_MAX_SHOWN = 80  # characters of a wrong value in an answer


class InvalidRequest(HTTPException):
    """A request with a wrong field.

    Attributes:
        param: the field, as `messages[0].content`.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(400, message)
        self.param = param


class JsonRoute(APIRoute):
    """A route whose body is a JSON object. Other bodies are refused before FastAPI sees them."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Any:
            return await handle(_JsonRequest(request.scope, request.receive))

        return read


class _JsonRequest(Request):
    async def body(self) -> bytes:
        """The body, if its type is JSON. (Web pages of other origins may send other types without permission.)"""
        content = await super().body()
        given = self.headers.get("content-type", "")
        message = Message()
        message["content-type"] = given
        subtype = message.get_content_subtype()
        if message.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
            found = f"it says {_quote(given)}" if given else "it has none"
            raise HTTPException(415, f"a request needs the header Content-Type: application/json; {found}")
        if not content.strip():
            raise InvalidRequest("", "the request has no body: it must be a JSON object")
        return content

    async def json(self) -> Any:
        """The body as an object.

        Raises:
            InvalidRequest: when it is not a JSON object.
        """
        try:
            content = await self.body()
            # Other requests do not wait for a large one.
            found = await asyncio.to_thread(_parse, content) if len(content) > _LARGE else _parse(content)
        except RequestRefused as error:
            raise InvalidRequest("", str(error)) from error
        if not isinstance(found, dict):
            raise InvalidRequest("", f"the request must be a JSON object; got {_quote(found)}")
        return found


def _parse(content: bytes) -> Any:
    return parse_json(content, "the request", error=RequestRefused, limit=len(content), depth=_MAX_DEPTH)


def read_object(given: Any, known: Iterable[str], path: str = "") -> Any:
    """Read the fields of a request, or of an object in it, that have an effect.

    Args:
        known: names of these fields.
        path: of the object, as `stream_options`; "" for the request.

    Raises:
        InvalidRequest: naming a field that is not supported, or unknown.
    """
    if not isinstance(given, Mapping):
        return given  # pydantic refuses it
    known = tuple(known)
    values = drop_empty(given, _EVEN_EMPTY)
    if "n" in values and _is_same(values.get("best_of"), values["n"]):
        del values["best_of"]
    for name in [name for name in values if name not in known]:
        value = values.pop(name)
        if path:
            raise _make_unknown(f"{path}.{name}", known)
        why, harmless = _NOT_SUPPORTED.get(name, ("", ()))
        if name in _WITHOUT_EFFECT or any(_is_same(value, other) for other in harmless):
            continue
        if why:
            raise InvalidRequest(name, f"{name}: {why} here; got {_quote(value)}")
        raise _make_unknown(name, known)
    return values


def read_chat(given: Any) -> Any:
    """Read a chat's messages and tools, as the engine does.

    The engine reads them again, because Triton also takes requests that did not come through here. This reading refuses
    wrong requests before they take a place in Triton, and once however many answers they want.

    Raises:
        InvalidRequest: naming what can't be read.
    """
    if not isinstance(given, dict):
        return given
    choice, parallel = given.pop("tool_choice", "auto"), given.pop("parallel_tool_calls", True)
    tools = given.pop("tools", None)
    if choice not in ("auto", "none"):
        raise InvalidRequest(
            "tool_choice", f"tool_choice: the model is not made to call tools here; got {_quote(choice)}"
        )
    try:
        if given.get("messages") is not None:
            given["messages"] = read_messages(given["messages"])
        tools = read_tools(tools)
    except RequestRefused as error:
        raise InvalidRequest(find_param(str(error)), str(error)) from error
    if tools and choice == "auto":
        if parallel is not True:
            why = f"calls are not counted here; got {_quote(parallel)}"
            raise InvalidRequest("parallel_tool_calls", f"parallel_tool_calls: {why}")
        given["tools"] = tools
    return given


def read_prompts(given: Any) -> list[Any]:
    """Read the prompts of a completion: texts and lists of token ids.

    Raises:
        InvalidRequest: saying what a prompt may be.
    """
    if _is_prompt(given):
        return [given]
    if isinstance(given, list) and given and not isinstance(given[0], int):
        if len(given) > _MAX_PROMPTS:
            raise InvalidRequest("prompt", f"prompt: {len(given)} prompts; at most {_MAX_PROMPTS} fit in a request")
        for i, one in enumerate(given):
            if not _is_prompt(one):
                raise _make_invalid(f"prompt[{i}]", "a text that is not empty, or a list of token ids", one)
        return given
    raise _make_invalid("prompt", "a text that is not empty, a list of token ids, or a list of these", given)


def _is_prompt(given: Any) -> bool:
    if isinstance(given, str):
        return bool(given)
    return isinstance(given, list) and bool(given) and all(type(token) is int and 0 <= token < 2**31 for token in given)


def read_stops(given: Any) -> Any:
    """Read stop texts as a list."""
    return [given] if isinstance(given, str) else given


def find_param(message: str) -> str:
    """Find the field that a refusal names; "" for none."""
    found = _PARAM.search(message)
    return found.group() if found else ""


def _make_unknown(path: str, known: Sequence[str]) -> InvalidRequest:
    name = path.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there is: {', '.join(known)}"
    return InvalidRequest(path, f"{path}: there is no such field here ({hint})")


def _make_invalid(path: str, what: str, value: Any) -> InvalidRequest:
    return InvalidRequest(path, f"{path} must be {what}; got {_quote(value)}")


def explain_error(error: Mapping[str, Any]) -> InvalidRequest:
    """Explain an error of pydantic's in our words."""
    words = [word for word in error["loc"] if word != "body"]
    path = "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in words).removeprefix(".")
    kind, limits = error["type"], error.get("ctx") or {}
    if kind == "missing":
        return InvalidRequest(path, f"{path} is missing")
    if kind == "extra_forbidden":
        return InvalidRequest(path, f"{path}: there is no such field here")
    return _make_invalid(
        path or "the request", _ALLOWED[kind](limits) if kind in _ALLOWED else "something else", error["input"]
    )


_ALLOWED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "string_type": lambda _: "a text",
    "string_unicode": lambda _: "a text of valid Unicode",
    "string_too_short": lambda _: "a text that is not empty",
    "string_too_long": lambda limits: f"a text of at most {limits['max_length']} characters",
    "int_type": lambda _: "a whole number",
    "float_type": lambda _: "a number",
    "finite_number": lambda _: "a finite number",
    "bool_type": lambda _: "true or false",
    "list_type": lambda _: "a list",
    "too_short": lambda limits: f"a list of at least {limits['min_length']}",
    "too_long": lambda limits: f"a list of at most {limits['max_length']}",
    "model_type": lambda _: "an object",
    "model_attributes_type": lambda _: "an object",
    "dict_type": lambda _: "an object",
    "greater_than_equal": lambda limits: f"at least {_format_number(limits['ge'])}",
    "greater_than": lambda limits: f"above {_format_number(limits['gt'])}",
    "less_than_equal": lambda limits: f"at most {_format_number(limits['le'])}",
}


def _format_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _is_same(one: Any, other: Any) -> bool:
    """Compare values and types: 0 is not false."""
    return type(one) is type(other) and bool(one == other)


def _quote(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        text = type(value).__name__
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
