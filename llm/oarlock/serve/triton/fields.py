"""The tensors of a request to Triton, and what the engine is asked by them. Knows neither Triton nor paddle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from oarlock.serve.engine.sampling_params import Prompt, RequestRefused, Sampling

# As in triton_repository/models/oarlock/config.pbtxt (held together by a test): numpy's type, whether it is a list.
FIELDS: dict[str, tuple[type, bool]] = {
    "text_input": (str, False),
    "messages": (str, False),
    "tools": (str, False),
    "input_ids": (int, True),
    "chat": (bool, False),
    "stream": (bool, False),
    "adapter": (str, False),
    "max_tokens": (int, False),
    "min_tokens": (int, False),
    "temperature": (float, False),
    "top_p": (float, False),
    "top_k": (int, False),
    "seed": (int, False),
    "repetition_penalty": (float, False),
    "frequency_penalty": (float, False),
    "presence_penalty": (float, False),
    "stop": (str, True),
    "stop_token_ids": (int, True),
    "ignore_eos": (bool, False),
}
OUTPUTS = ("text_output", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens")
# Parameters of requests that the endpoint and the models beside the streaming one make.
CANCEL, RELAYED, DEFAULT_TOKENS = "oarlock_cancel", "oarlock_relayed", "oarlock_default_tokens"
# Inside of Triton, and in a stream, an error is a text without its code: the code goes before it for those who say that
# they pass it on.
CODES = ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL")
_NUMPY: dict[type, Any] = {int: np.int32, float: np.float32, bool: np.bool_}
_SAMPLING = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty"),
    *("frequency_penalty", "presence_penalty", "ignore_eos"),
)


def split_code(text: str) -> tuple[str, str]:
    """Code and message of an error's text; the code is "" where there is none."""
    code, separator, message = text.partition(": ")
    return (code, message) if separator and code in CODES else ("", text)


def make_tensor(name: str, values: list[Any]) -> np.ndarray:
    """A field's tensor of Python values.

    Raises:
        OverflowError, UnicodeEncodeError: for what does not fit it.
    """
    kind, _ = FIELDS[name]
    if kind is str:
        return np.array([text.encode("utf-8") for text in values], dtype=object)
    number = np.dtype(np.int64 if name == "seed" else _NUMPY[kind])
    if number.kind == "i":  # NumPy 1 takes the lowest bits of what does not fit
        limits = np.iinfo(number)
        for value in values:
            if not limits.min <= value <= limits.max:
                raise OverflowError(f"{value} does not fit a number of {number.itemsize * 8} bits")
    with np.errstate(over="ignore"):  # infinity is refused where the value is looked at
        return np.array(values, np.float64).astype(number) if number.kind == "f" else np.array(values, number)


@dataclass(frozen=True)
class Asked:
    """What a request asks.

    Attributes:
        stream: a response for each piece, in place of one for all.
    """

    prompt: Prompt
    sampling: Sampling
    stream: bool


def read_fields(tensors: Mapping[str, np.ndarray], max_bytes: int, default_tokens: int | None = None) -> Asked:
    """A request's tensors, each of shape [1] or, for lists, [n]; BYTES are numpy arrays of bytes.

    Args:
        max_bytes: of all texts together.
        default_tokens: of an answer without max_tokens; None for as many as there is room for.

    Raises:
        RequestRefused: naming the tensor that is not as it should be.
    """
    if sum(_num_bytes(tensor) for tensor in tensors.values()) > max_bytes:
        raise RequestRefused(f"the request is larger than the {max_bytes:,} bytes that one may have")
    values = {name: _value(name, tensor) for name, tensor in tensors.items()}
    return read_values(values, default_tokens)


def read_values(values: Mapping[str, Any], default_tokens: int | None = None) -> Asked:
    """The same from Python values."""
    stops, stop_tokens = tuple(values.get("stop", ())), tuple(values.get("stop_token_ids", ()))
    given = {name: values[name] for name in _SAMPLING if name in values}
    sampling = Sampling(
        **given,
        stop=stops,
        stop_token_ids=stop_tokens,
        default_tokens=default_tokens,
        given=frozenset(given),
    )
    return Asked(_prompt(values), sampling, bool(values.get("stream", False)))


def _prompt(values: Mapping[str, Any]) -> Prompt:
    given = [name for name in ("text_input", "messages", "input_ids") if name in values]
    if len(given) != 1:
        raise RequestRefused(f"give one of text_input, messages and input_ids; got {', '.join(given) or 'none'}")
    adapter = values.get("adapter") or None
    tools = _json("tools", values["tools"]) if values.get("tools") else None
    if given == ["input_ids"]:
        return Prompt(token_ids=list(values["input_ids"]), adapter=adapter, tools=tools)
    if given == ["messages"]:
        return Prompt(messages=_json("messages", values["messages"]), adapter=adapter, tools=tools)
    text = values["text_input"]
    if values.get("chat"):
        return Prompt(messages=[{"role": "user", "content": text}], adapter=adapter, tools=tools)
    return Prompt(text=text, adapter=adapter, tools=tools)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)  # the engine looks at what is in it
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"{name}: not JSON: {error}") from error


def _num_bytes(tensor: np.ndarray) -> int:
    if tensor.dtype == object:
        return sum(len(text) for text in tensor.reshape(-1))
    return tensor.nbytes


def _value(name: str, tensor: np.ndarray) -> Any:
    if name not in FIELDS:
        raise RequestRefused(f"there is no input {name!r} (there are: {', '.join(FIELDS)})")
    kind, is_list = FIELDS[name]
    if tensor.ndim != 1 or (not is_list and tensor.size != 1):
        raise RequestRefused(f"{name}: shape {list(tensor.shape)}, it has to be {'[n]' if is_list else '[1]'}")
    values = [_scalar(name, kind, value) for value in tensor.tolist()]
    return values if is_list else values[0]


def _scalar(name: str, kind: type, value: Any) -> Any:
    if kind is str and isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestRefused(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error
    if type(value) is not kind:
        raise RequestRefused(f"{name}: {type(value).__name__} in place of {kind.__name__}")
    return value
