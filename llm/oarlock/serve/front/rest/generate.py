"""Triton's generate extension: an object of inputs by name as a gRPC request, and the answer as an object.

As in Triton 24.10, an input is a value or a list of values, whose shape is fitted to the model's. The content of
"parameters" is read in the same way. A list of one is written as its element.
"""

from __future__ import annotations

import math
from typing import Any

from tritonclient.grpc import service_pb2

from oarlock.serve.front.http.refusal import HttpRefusal, quote
from oarlock.serve.front.model_forms import InputForm, ModelForm
from oarlock.serve.front.rest.infer import read_parameters, set_parameter, to_json
from oarlock.serve.front.rest.tensors import bytes_to_values, flatten, values_to_bytes

_MAX_FIELDS = 256


def read_generate(given: dict[str, Any], form: ModelForm, version: str) -> service_pb2.ModelInferRequest:
    """Read the request in an object. Its tensors are checked later, like those that come over gRPC.

    Raises:
        HttpRefusal: naming the field that is wrong.
    """
    request = service_pb2.ModelInferRequest(model_name=form.name, model_version=version)
    fields = list(given.items())
    nested = given.get("parameters")
    if nested is not None and "parameters" not in form.inputs:
        if not isinstance(nested, dict):
            raise HttpRefusal(400, "Expected JSON object for keyword: 'parameters'")
        fields = [*((name, value) for name, value in fields if name != "parameters"), *nested.items()]
    if len(fields) > _MAX_FIELDS:
        raise HttpRefusal(400, f"{len(fields):,} fields; a request may have {_MAX_FIELDS}")
    for name, value in fields:
        wanted = form.inputs.get(name)
        if value is None or (wanted is None and value in ("", [], {})):
            continue  # empty; clients of other servers send such fields
        if wanted is not None:
            _add_input(request, name, value, wanted)
        elif name == "id" and isinstance(value, str):
            request.id = value if value.isprintable() else ""
        elif form.content != "other":
            known = ", ".join(form.inputs)
            raise HttpRefusal(400, f"{quote(name)}: model {form.name!r} has no such input (it has: {known})")
        elif not name.isprintable():
            raise HttpRefusal(400, f"{quote(name)}: it must be a printable text")
        else:
            set_parameter(request, name, value)
    return request


def write_generate(answer: service_pb2.ModelInferResponse) -> bytes:
    """Write an answer as JSON, its fields in alphabetical order."""
    content: dict[str, Any] = {"model_name": answer.model_name, "model_version": answer.model_version}
    if answer.id:
        content["id"] = answer.id
    content |= read_parameters(answer.parameters)
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        values = bytes_to_values(output, raw)
        content[output.name] = values[0] if len(values) == 1 else values
    return to_json(dict(sorted(content.items())))


def _add_input(request: service_pb2.ModelInferRequest, name: str, value: Any, wanted: InputForm) -> None:
    if isinstance(value, dict):
        raise HttpRefusal(400, f"{name}: it must be a value or a list of values")
    count = len(value) if isinstance(value, list) else 1
    values = flatten(value)
    if len(values) != count:
        raise HttpRefusal(400, f"{name}: lists in lists can't be given here")
    fixed, shape = math.prod(size for size in wanted.dims if size != -1), list(wanted.dims)
    fits, left = fixed > 0 and count % fixed == 0, count // max(fixed, 1)
    for i in reversed(range(len(shape))):  # the last free dimension gets what the fixed ones leave; the others are 1
        if shape[i] == -1:
            shape[i], left = left, 1
    if not fits or left != 1:
        dims = ", ".join("n" if size < 0 else str(size) for size in wanted.dims)
        raise HttpRefusal(400, f"{name}: {count:,} values; its shape must be [{dims}]")
    request.inputs.add(name=name, datatype=wanted.datatype, shape=shape)
    request.raw_input_contents.append(values_to_bytes(name, wanted.datatype, values))
