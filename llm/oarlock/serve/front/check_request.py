"""Checks a request before Triton gets it: everything that Triton would believe.

Triton 24.10 crashes on a shape whose product has more than 64 bits, and accepts shared memory, parameters of its own
models and sizes without a check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc.service_pb2 import ModelInferRequest

from oarlock.errors import RequestRefused
from oarlock.formats.json_file import parse_json
from oarlock.serve.front.http.refusal import quote
from oarlock.serve.front.model_forms import InputForm, ModelForm, RequestLimits
from oarlock.serve.triton.fastdeploy_json import read_form, use_form_names
from oarlock.serve.triton.fields import read_request

_MAX_NAME, _MAX_PARAMETERS, _MAX_RANK = 256, 16, 8
_MAX_DEPTH = 64  # levels of JSON inside a text
# Parameters of a request that Triton or its clients use, and the types of their values.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "triton_enable_empty_final_response": ("bool_param",),
    "sequence_id": ("int64_param", "uint64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param", "uint64_param"),
}
# datatype -> type of numpy (little endian, as in requests), field of InferTensorContents.
_TYPES: dict[str, tuple[str, str]] = {
    "BOOL": ("|b1", "bool_contents"),
    "UINT8": ("|u1", "uint_contents"),
    "UINT16": ("<u2", "uint_contents"),
    "UINT32": ("<u4", "uint_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "INT8": ("|i1", "int_contents"),
    "INT16": ("<i2", "int_contents"),
    "INT32": ("<i4", "int_contents"),
    "INT64": ("<i8", "int64_contents"),
    "FP16": ("<f2", ""),  # only as bytes
    "BF16": ("<u2", ""),
    "FP32": ("<f4", "fp32_contents"),
    "FP64": ("<f8", "fp64_contents"),
    "BYTES": ("", "bytes_contents"),
}


class UnknownModel(RequestRefused):
    """A request to a model that is not served here."""


def check_infer_request(request: ModelInferRequest, limits: RequestLimits) -> None:
    """Refuse a request that its model can't answer.

    Raises:
        UnknownModel: when there is no such model.
        RequestRefused: naming what is wrong.
    """
    form = limits.models.get(request.model_name)
    if form is None:
        raise UnknownModel(f"Request for unknown model: {quote(request.model_name)} is not found")
    version, name = request.model_version, request.id
    if version and not (version.isascii() and version.isdigit() and len(version) < 19):
        raise RequestRefused(f"model_version {quote(version)}: it must be a whole number above 0")
    if len(name) > _MAX_NAME or not name.isprintable():
        raise RequestRefused(f"id: at most {_MAX_NAME} characters that can be printed")
    _check_parameters(request.parameters, form)
    names: set[str] = set()
    for output in request.outputs:
        if output.name not in form.outputs:
            known = ", ".join(form.outputs)
            raise RequestRefused(f"there is no output {quote(output.name)} (there are: {known})")
        if output.name in names:
            raise RequestRefused(f"output {output.name!r} is asked for twice")
        names.add(output.name)
        for parameter in output.parameters:
            if not (form.content == "other" and parameter == "classification"):
                raise RequestRefused(f"output {output.name!r}: parameter {quote(parameter)} can't be given here")
    tensors = _read_tensors(request, form, limits.max_body)
    if form.content == "form":
        fields, _ = read_form(tensors["IN"][0])
        try:
            read_request(fields, limits.max_body).check()
        except RequestRefused as error:
            raise RequestRefused(use_form_names(str(error))) from error
        _check_json("IN", tensors, limits.max_body)
    elif form.content == "fields":
        read_request(tensors, limits.max_body).check()
        for field in ("messages", "tools"):
            _check_json(field, tensors, limits.max_body)


def _check_json(name: str, tensors: Mapping[str, np.ndarray], max_body: int) -> None:
    """Refuse what json.loads accepts: doubled fields, NaN, and deeper nesting than in other requests."""
    if name in tensors:
        parse_json(tensors[name][0], name, error=RequestRefused, limit=max_body, depth=_MAX_DEPTH)


def _check_parameters(parameters: Mapping[str, Any], form: ModelForm) -> None:
    if len(parameters) > _MAX_PARAMETERS:
        raise RequestRefused(f"parameters: {len(parameters)}; a request may have {_MAX_PARAMETERS}")
    for name, value in parameters.items():
        kinds = _PARAMETERS.get(name)
        chosen = value.WhichOneof("parameter_choice")
        if kinds is None:
            # A model of somebody else may have parameters of its own. Triton reserves names with this prefix.
            if form.content == "other" and not name.startswith(("triton_", "oarlock_")) and name.isprintable():
                continue
            raise RequestRefused(f"there is no parameter {quote(name)} (there are: {', '.join(_PARAMETERS)})")
        if chosen not in kinds:
            wanted = " or ".join(kind.removesuffix("_param") for kind in kinds)
            raise RequestRefused(f"parameter {name}: it must be {wanted}")
        text = value.string_param
        if len(text) > _MAX_NAME or not text.isprintable():
            raise RequestRefused(f"parameter {name}: at most {_MAX_NAME} characters that can be printed")
        if chosen == "int64_param" and value.int64_param < 0:
            raise RequestRefused(f"parameter {name}: it must be at least 0; got {value.int64_param}")


def _read_tensors(request: ModelInferRequest, form: ModelForm, max_body: int) -> dict[str, np.ndarray]:
    """The inputs, whose contents have the size of their shapes; BYTES are arrays of bytes."""
    found: dict[str, np.ndarray] = {}
    raw = request.raw_input_contents
    # An input without contents would be in shared memory, which is closed.
    if raw and len(raw) != len(request.inputs):
        raise RequestRefused(f"{len(raw)} contents of {len(request.inputs)} inputs in raw_input_contents")
    if sum(map(len, raw)) > max_body:
        raise RequestRefused(f"the request is larger than the {max_body:,} bytes that one may have")
    for i, tensor in enumerate(request.inputs):
        wanted = form.inputs.get(tensor.name)
        if wanted is None:
            known = ", ".join(form.inputs)
            raise RequestRefused(f"there is no input {quote(tensor.name)} (there are: {known})")
        if tensor.name in found:
            raise RequestRefused(f"input {tensor.name!r} is given twice")
        for name in tensor.parameters:
            raise RequestRefused(f"input {tensor.name!r}: parameter {quote(name)} can't be given here")
        if tensor.datatype != wanted.datatype:
            raise RequestRefused(
                f"{tensor.name}: data-type {quote(tensor.datatype)}, model {form.name!r} expects {wanted.datatype!r}"
            )
        shape = _check_shape(tensor.name, tensor.shape, wanted, form, max_body)
        if raw:
            if tensor.HasField("contents"):
                raise RequestRefused(f"{tensor.name}: contents as well as raw_input_contents")
            found[tensor.name] = _from_bytes(tensor.name, wanted.datatype, shape, raw[i])
        else:
            found[tensor.name] = _from_values(tensor.name, wanted.datatype, shape, tensor.contents)
    missing = [name for name, wanted in form.inputs.items() if not wanted.optional and name not in found]
    if missing:
        raise RequestRefused(f"input {missing[0]!r} is missing")
    return found


def _check_shape(
    name: str, given: Sequence[int], wanted: InputForm, form: ModelForm, most_elements: int
) -> tuple[int, ...]:
    """The shape of an input, if the model allows it. (An element has at least one byte.)"""
    dims = ((-1, *wanted.dims) if form.max_batch_size else wanted.dims)[:_MAX_RANK]
    shape = tuple(given[: _MAX_RANK + 1])
    fits = len(given) == len(dims) and all(
        0 <= size <= most_elements and most in (-1, size) for size, most in zip(shape, dims, strict=True)
    )
    if not fits or (form.max_batch_size and not 1 <= shape[0] <= form.max_batch_size):
        what = str(list(shape)) if len(given) <= _MAX_RANK else f"of {len(given)} dimensions"
        allowed = ", ".join("n" if size < 0 else str(size) for size in dims)
        raise RequestRefused(f"{name}: shape {what}, it must be [{allowed}]")
    return shape


def _from_bytes(name: str, datatype: str, shape: tuple[int, ...], raw: bytes) -> np.ndarray:
    count = math.prod(shape)
    if datatype == "BYTES":  # each element follows its length in 4 bytes
        texts: list[bytes] = []
        offset = 0
        while offset < len(raw) and len(texts) <= count:
            length = int.from_bytes(raw[offset : offset + 4], "little")
            end = offset + 4 + length
            if end > len(raw):
                raise RequestRefused(f"{name}: malformed: element {len(texts)} is longer than the contents")
            texts.append(raw[offset + 4 : end])
            offset = end
        if len(texts) != count:
            found = f"more than {count:,}" if len(texts) > count else f"{len(texts):,}"
            raise RequestRefused(f"{name}: malformed: shape {list(shape)} has {count:,} elements, got {found}")
        return _as_array(texts, shape)
    numpy_type = np.dtype(_TYPES[datatype][0])
    if count * numpy_type.itemsize != len(raw):
        expected = count * numpy_type.itemsize
        raise RequestRefused(f"{name}: malformed: shape {list(shape)} has {expected:,} bytes, got {len(raw):,} bytes")
    if datatype == "BOOL" and raw.translate(None, b"\0\1"):
        raise RequestRefused(f"{name}: malformed: a BOOL is a byte 0 or 1")
    return np.frombuffer(raw, numpy_type).reshape(shape)


def _from_values(name: str, datatype: str, shape: tuple[int, ...], contents: Any) -> np.ndarray:
    numpy_type, wanted = _TYPES[datatype]
    for field, _ in contents.ListFields():
        if field.name != wanted:
            allowed = f"it must be {wanted}" if wanted else "it goes into raw_input_contents"
            raise RequestRefused(f"{name}: {field.name} for {datatype}; {allowed}")
    values = getattr(contents, wanted) if wanted else []
    count = math.prod(shape)
    if len(values) != count:
        raise RequestRefused(f"{name}: malformed: shape {list(shape)} has {count:,} elements, got {len(values):,}")
    if datatype == "BYTES":
        return _as_array(list(values), shape)
    kind = np.dtype(numpy_type)
    if kind.kind in "iu" and kind.itemsize < 4:
        limits = np.iinfo(kind)
        if any(not limits.min <= value <= limits.max for value in values):
            raise RequestRefused(f"{name}: a value does not fit {datatype}")
    return np.array(values, kind).reshape(shape)


def _as_array(texts: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    made = np.empty(len(texts), object)
    made[:] = texts
    return made.reshape(shape)
