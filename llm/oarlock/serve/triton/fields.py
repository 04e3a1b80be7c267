"""A request as the input tensors of the streaming model, and back. Imports neither Triton nor paddle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from oarlock.errors import RequestRefused
from oarlock.sampling.params import OPTIONS, SamplingParams
from oarlock.serve.request import GenerationRequest, Prompt
from oarlock.triton_repository.inputs import INPUTS

# Parameters of requests that the OpenAI endpoint and the relaying models send to the streaming model.
CANCEL, RELAYED, DEFAULT_TOKENS = "oarlock_cancel", "oarlock_relayed", "oarlock_default_tokens"
# Inside Triton, and in a stream, an error is a text without its code. It is sent before the text to those who pass
# errors on.
CODES = ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL")
_NUMPY: dict[str, Any] = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BOOL": np.bool_}


def split_code(text: str) -> tuple[str, str]:
    """Split an error's text into code and message. The code is "" if there is none."""
    code, separator, message = text.partition(": ")
    return (code, message) if separator and code in CODES else ("", text)


def make_tensor(name: str, values: list[Any]) -> np.ndarray:
    """Make an input tensor [n] of Python values. Texts become UTF-8 bytes in an object array.

    Raises:
        OverflowError, UnicodeEncodeError: when a value does not fit.
    """
    datatype = INPUTS[name].datatype
    if datatype == "STRING":
        return np.array([text.encode("utf-8") for text in values], dtype=object)
    number: np.dtype[Any] = np.dtype(_NUMPY[datatype])
    if number.kind == "i":  # NumPy 1 keeps the lowest bits of what does not fit
        limits = np.iinfo(number)
        for value in values:
            if not limits.min <= value <= limits.max:
                raise OverflowError(f"{value} does not fit a number of {number.itemsize * 8} bits")
    with np.errstate(over="ignore"):  # infinity is refused with the other checks of values
        return np.array(values, np.float64).astype(number) if number.kind == "f" else np.array(values, number)


def write_request(request: GenerationRequest) -> dict[str, np.ndarray]:
    """Make the input tensors of a request: its prompt, and the sampling parameters that the caller set."""
    prompt, sampling = request.prompt, request.sampling
    values: dict[str, Any] = {
        "text_input": prompt.text,
        "messages": None if prompt.messages is None else json.dumps(prompt.messages),
        "tools": json.dumps(prompt.tools) if prompt.tools else None,
        "input_ids": prompt.token_ids,
        "adapter": prompt.adapter,
        "stream": request.stream,
    }
    for name, option in OPTIONS.items():
        if sampling.given is None or name in sampling.given or option.is_list:
            values[name] = getattr(sampling, name)
    return {
        name: make_tensor(name, list(value) if INPUTS[name].is_list else [value])
        for name, value in values.items()
        if value not in (None, ())
    }


def read_request(
    tensors: Mapping[str, np.ndarray], max_bytes: int, default_tokens: int | None = None
) -> GenerationRequest:
    """Read a request from input tensors, each of shape [1] or, for lists, [n]. Texts are arrays of bytes.

    Args:
        max_bytes: limit for all tensors together.
        default_tokens: longest answer if max_tokens is not given; None for as many as the limits allow.

    Raises:
        RequestRefused: naming the tensor that is wrong.
    """
    size = sum(
        sum(map(len, tensor.reshape(-1))) if tensor.dtype == object else tensor.nbytes for tensor in tensors.values()
    )
    if size > max_bytes:
        raise RequestRefused(f"the request is larger than the {max_bytes:,} bytes that one may have")
    values = {name: _read_value(name, tensor) for name, tensor in tensors.items()}
    given = {name: values[name] for name in OPTIONS if name in values}
    sampling = SamplingParams(**given, default_tokens=default_tokens, given=frozenset(given))
    return GenerationRequest(_read_prompt(values), sampling, values.get("stream", False))


def _read_prompt(values: Mapping[str, Any]) -> Prompt:
    given = [name for name in ("text_input", "messages", "input_ids") if name in values]
    if len(given) != 1:
        raise RequestRefused(f"give one of text_input, messages and input_ids; got {', '.join(given) or 'none'}")
    adapter = values.get("adapter") or None
    tools = _parse_json("tools", values["tools"]) if values.get("tools") else None
    if given == ["input_ids"]:
        return Prompt(token_ids=list(values["input_ids"]), adapter=adapter, tools=tools)
    if given == ["messages"]:
        return Prompt(messages=_parse_json("messages", values["messages"]), adapter=adapter, tools=tools)
    text = values["text_input"]
    if values.get("chat"):
        return Prompt(messages=[{"role": "user", "content": text}], adapter=adapter, tools=tools)
    return Prompt(text=text, adapter=adapter, tools=tools)


def _parse_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)  # the engine checks the content
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"{name}: not JSON: {error}") from error


def _read_value(name: str, tensor: np.ndarray) -> Any:
    if name not in INPUTS:
        raise RequestRefused(f"there is no input {name!r} (there are: {', '.join(INPUTS)})")
    wanted = INPUTS[name]
    if tensor.ndim != 1 or (not wanted.is_list and tensor.size != 1):
        raise RequestRefused(f"{name}: shape {list(tensor.shape)}, it must be {'[n]' if wanted.is_list else '[1]'}")
    values, kind = tensor.tolist(), wanted.kind
    for i, value in enumerate(values):
        if kind is str and isinstance(value, bytes):
            try:
                values[i] = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RequestRefused(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error
        elif type(value) is not kind:
            raise RequestRefused(f"{name}: {type(value).__name__} in place of {kind.__name__}")
    return tuple(values) if wanted.is_list else values[0]
