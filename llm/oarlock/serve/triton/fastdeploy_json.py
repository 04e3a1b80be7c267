"""FastDeploy's JSON form of requests and answers, converted from and to tensors of the streaming model.

    {"text": ..., "topp": ..., "temperature": ..., "max_dec_len": ..., "min_dec_len": ..., "penalty_score": ...,
     "frequency_score": ..., "presence_score": ..., "eos_token_ids": [...], "req_id": ...}
    -> {"result": ..., "req_id": ..., "token_ids": [...], "send_idx": 0, "is_end": 0}

"messages" (in place of "text"), "tools", "topk", "adapter", "seed" and "stop" are Oarlock's additions.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from oarlock.errors import RequestRefused
from oarlock.sampling.params import OPTIONS
from oarlock.serve.triton.fields import make_tensor
from oarlock.triton_repository.inputs import INPUTS

# Name in the form -> name of the tensor.
_NAMES = {name: name for name in ("messages", "tools", "adapter")} | {
    "text": "text_input",
    **{option.fastdeploy: option.name for option in OPTIONS.values() if option.fastdeploy},
}

_FORM_NAMES = {tensor: name for name, tensor in _NAMES.items() if tensor != name}
_TENSOR_NAMES = re.compile(rf"\b(?:{'|'.join(_FORM_NAMES)})\b")


def read_form(text: bytes) -> tuple[dict[str, np.ndarray], Any]:
    """Read the tensors of a form, and its req_id (None if it has none).

    Raises:
        RequestRefused: naming what is wrong.
    """
    try:
        form = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RequestRefused(f"IN: not JSON in UTF-8: {error}") from error
    if not isinstance(form, dict):
        raise RequestRefused("IN: it must be a JSON object")
    req_id = form.pop("req_id", None)
    unknown = sorted(set(form) - set(_NAMES))
    if unknown:
        raise RequestRefused(f"IN: there is no field {unknown[0]!r} (there is: req_id, {', '.join(_NAMES)})")
    # A field that is null, or an empty list, counts as absent.
    given = {name: value for name, value in form.items() if value is not None and (value != [] or name == "messages")}
    for name in ("messages", "tools"):
        if name in given:
            given[name] = json.dumps(given[name])
    tensors = {_NAMES[name]: _make_field(name, value) for name, value in given.items()}
    return tensors | {"stream": np.array([True])}, req_id


def use_form_names(message: str) -> str:
    """Replace the streaming model's names of fields in a message by the form's."""
    return _TENSOR_NAMES.sub(lambda found: _FORM_NAMES[found.group()], message)


def write_form(text: str, token_ids: list[int], req_id: Any, send_idx: int, is_end: bool) -> bytes:
    """Write a part of the answer."""
    form = {
        "result": text,
        "req_id": req_id,
        "token_ids": token_ids,
        "send_idx": send_idx,
        "is_end": int(is_end),
    }
    return json.dumps(form, ensure_ascii=False).encode("utf-8", "replace")


def _make_field(name: str, value: Any) -> np.ndarray:
    kind, is_list = INPUTS[_NAMES[name]].kind, INPUTS[_NAMES[name]].is_list
    values = value if is_list and isinstance(value, list) else [value]
    if kind is float:
        values = [float(item) if type(item) is int and abs(item) < 1 << 53 else item for item in values]
    if any(type(item) is not kind for item in values):
        raise RequestRefused(f"{name}: it must be {'a list of ' if is_list else ''}{kind.__name__}")
    try:
        return make_tensor(_NAMES[name], values)
    except (OverflowError, UnicodeEncodeError) as error:
        raise RequestRefused(f"{name}: {error}") from error
