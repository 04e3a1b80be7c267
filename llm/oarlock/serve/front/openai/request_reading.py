"""How the JSON of OpenAI's requests is read: what says nothing is left out, what is not done here is refused by name.

Clients write every optional field (null, or an empty list), and send messages back as they got them: such fields are
absent. What is wrong is said in one sentence that names the field, whatever pydantic calls it.
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
from oarlock.serve.engine.messages import read_messages, read_tools, without_nothing

# Fields of OpenAI's requests, and of vLLM's, that are not done here: why, and the values that ask for nothing.
_NOT_DONE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "add_generation_prompt": ("an answer always has a turn of its own", (True,)),
    "audio": ("answers are text", ()),
    "best_of": ("use n", (1,)),
    "continue_final_message": ("an answer always has a turn of its own", (False,)),
    "echo": ("the prompt is not repeated", (False,)),
    "function_call": ("the model is not made to call functions", ("none", "auto")),
    "functions": ("use tools", ()),
    "include_stop_str_in_output": ("nothing of a stop text is given", (False,)),
    "length_penalty": ("there is no beam search", (1, 1.0)),
    "logit_bias": ("scores of tokens can't be changed", ()),
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
# What says who asks, and how to keep or to charge for it: of no meaning for the answer.
_OF_NO_MEANING = (
    *("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    *("safety_identifier",),
)
_EVEN_EMPTY = ("messages", "model", "prompt", "content", "web_search_options")  # where empty is not absent
_MAX_PROMPTS = 16
_PARAM = re.compile(
    r"\b(?:messages(?:\[\d+\](?:\.\w+|\[\d+\])*)?|tools(?:\[\d+\](?:\.\w+)*)?|max_tokens|min_tokens|stop_token_ids)(?!\w)"
)
_LARGE = 65536  # bytes of a request
_DEEPEST = 128  # levels of lists and objects; those of a tool are counted by themselves
_MAX_SHOWN = 80  # characters of a wrong value in an answer


class WrongRequest(HTTPException):
    """A request that can't be answered as it is asked.

    Attributes:
        param: the field, as `messages[0].content`.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(400, message)
        self.param = param


class JsonRoute(APIRoute):
    """A route whose body is a JSON object; any other is refused before FastAPI sees it."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """See APIRoute."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Any:
            return await handle(_JsonRequest(request.scope, request.receive))

        return read


class _JsonRequest(Request):
    async def body(self) -> bytes:
        """Bytes of what says that it is JSON. (Other types can be sent from web pages of other origins, unasked.)"""
        content = await super().body()
        given = self.headers.get("content-type", "")
        message = Message()
        message["content-type"] = given
        subtype = message.get_content_subtype()
        if message.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
            told = f"it says {_shown(given)}" if given else "it has none"
            raise HTTPException(415, f"a request needs the header Content-Type: application/json; {told}")
        if not content.strip():
            raise WrongRequest("", "the request has no body: it has to be a JSON object")
        return content

    async def json(self) -> Any:
        """The object.

        Raises:
            WrongRequest: when it is none.
        """
        try:
            content = await self.body()
            # A large one does not hold up the others.
            found = await asyncio.to_thread(_parsed, content) if len(content) > _LARGE else _parsed(content)
        except RequestRefused as error:
            raise WrongRequest("", str(error)) from error
        if not isinstance(found, dict):
            raise WrongRequest("", f"the request has to be a JSON object; got {_shown(found)}")
        return found


def _parsed(content: bytes) -> Any:
    return parse_json(content, "the request", error=RequestRefused, limit=len(content), depth=_DEEPEST)


def read_object(given: Any, known: Iterable[str], path: str = "") -> Any:
    """The fields of a request, or of an object in it, that are to be honoured.

    Args:
        known: names of these.
        path: of the object, as `stream_options`; "" for the request.

    Raises:
        WrongRequest: naming a field that is not done here, or that there is none of.
    """
    if not isinstance(given, Mapping):
        return given  # pydantic says so
    known = tuple(known)
    values = without_nothing(given, _EVEN_EMPTY)
    if "n" in values and _same(values.get("best_of"), values["n"]):
        del values["best_of"]
    for name in [name for name in values if name not in known]:
        value = values.pop(name)
        if path:
            raise _unknown(f"{path}.{name}", known)
        why, harmless = _NOT_DONE.get(name, ("", ()))
        if name in _OF_NO_MEANING or any(_same(value, other) for other in harmless):
            continue
        if why:
            raise WrongRequest(name, f"{name}: {why} here; got {_shown(value)}")
        raise _unknown(name, known)
    return values


def read_chat(given: Any) -> Any:
    """A chat's messages and tools, as the engine reads them.

    Raises:
        WrongRequest: naming what can't be read.
    """
    if not isinstance(given, dict):
        return given
    choice, parallel = given.pop("tool_choice", "auto"), given.pop("parallel_tool_calls", True)
    tools = given.pop("tools", None)
    if choice not in ("auto", "none"):
        raise WrongRequest(
            "tool_choice", f"tool_choice: the model is not made to call tools here; got {_shown(choice)}"
        )
    try:
        if given.get("messages") is not None:
            given["messages"] = read_messages(given["messages"])
        tools = read_tools(tools)
    except RequestRefused as error:
        raise WrongRequest(param_of(str(error)), str(error)) from error
    if tools and choice == "auto":
        if parallel is not True:
            why = f"calls are not counted here; got {_shown(parallel)}"
            raise WrongRequest("parallel_tool_calls", f"parallel_tool_calls: {why}")
        given["tools"] = tools
    return given


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


def param_of(message: str) -> str:
    """The field that a refusal names; "" for none."""
    found = _PARAM.search(message)
    return found.group() if found else ""


def _unknown(path: str, known: Sequence[str]) -> WrongRequest:
    name = path.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there is: {', '.join(known)}"
    return WrongRequest(path, f"{path}: there is no such field here ({hint})")


def has_to_be(path: str, what: str, value: Any) -> WrongRequest:
    """For a value of a wrong kind."""
    return WrongRequest(path, f"{path} has to be {what}; got {_shown(value)}")


def wrong_value(error: Mapping[str, Any]) -> WrongRequest:
    """An error of pydantic's in our words."""
    words = [word for word in error["loc"] if word != "body"]
    path = "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in words).removeprefix(".")
    kind, limits = error["type"], error.get("ctx") or {}
    if kind == "missing":
        return WrongRequest(path, f"{path} is missing")
    if kind == "extra_forbidden":
        return WrongRequest(path, f"{path}: there is no such field here")
    return has_to_be(
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
    "greater_than_equal": lambda limits: f"at least {_number(limits['ge'])}",
    "greater_than": lambda limits: f"above {_number(limits['gt'])}",
    "less_than_equal": lambda limits: f"at most {_number(limits['le'])}",
}


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _same(one: Any, other: Any) -> bool:
    """Equal, and of one type: 0 is not false."""
    return type(one) is type(other) and bool(one == other)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        text = type(value).__name__
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
