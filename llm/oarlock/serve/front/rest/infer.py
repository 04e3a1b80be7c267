"""KServe's /infer: JSON, or JSON followed by binary tensors, as a gRPC request, and the answer back."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2

from oarlock.serve.front.http.json_body import read_object
from oarlock.serve.front.http.refusal import HttpRefusal, quote, quote_json
from oarlock.serve.front.rest.tensors import bytes_to_values, flatten, values_to_bytes

_FIELDS = ("id", "parameters", "inputs", "outputs", "model_name", "model_version")
_INPUT_FIELDS = ("name", "shape", "datatype", "parameters", "data")
_SIZE, _BINARY, _ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"
_MAX_TENSORS = 64
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}  # of zlib: with gzip's header, and with zlib's


@dataclass
class InferRequest:
    """A request to /infer.

    Attributes:
        request: for Triton.
        binary: for each named output, whether it is sent as bytes.
        all_binary: the same for outputs that are not named.
    """

    request: service_pb2.ModelInferRequest
    binary: dict[str, bool] = field(default_factory=dict)
    all_binary: bool = False


def unpack(body: bytes, encoding: bytes, most_bytes: int) -> bytes:
    """Decode the Content-Encoding of a body. No more than `most_bytes` are ever decoded.

    Raises:
        HttpRefusal: when there is more, or the body is damaged.
    """
    if encoding not in _WINDOW_BITS:
        return body
    unpacker = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        content = unpacker.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise HttpRefusal(400, f"the body is not valid {encoding.decode()}: {error}") from error
    if len(content) > most_bytes:
        raise HttpRefusal(413, f"the request is larger than {most_bytes:,} bytes when it is decompressed")
    if not unpacker.eof or unpacker.unused_data:
        raise HttpRefusal(400, f"the body is not complete {encoding.decode()}")
    return content


def read_infer(body: bytes, header_length: bytes | None, model: str, version: str) -> InferRequest:
    """Read a body of /infer. Its tensors are checked later, like those that come over gRPC.

    Args:
        header_length: bytes of the JSON before binary tensors; None if there are none.

    Raises:
        HttpRefusal: naming what is wrong.
    """
    head, tail = body, b""
    if header_length is not None:
        if not header_length.isdigit() or len(header_length) > 12 or int(header_length) > len(body):
            size = quote(header_length.decode("latin-1"))
            raise HttpRefusal(400, f"inference header size should be in range (0, {len(body)}), got: {size}")
        length = int(header_length)
        if not length:
            raise HttpRefusal(400, "a body of one raw tensor alone is not read here: send its name, shape and datatype")
        head, tail = body[:length], body[length:]
    given = read_object(head)
    for name in given:
        if name not in _FIELDS:
            raise HttpRefusal(400, f"{quote(name)}: there is no such field here (there are: {', '.join(_FIELDS)})")
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    if "id" in given:
        request.id = _check_text("id", given["id"])
    asked = InferRequest(request)
    for name, value in _check_object("parameters", given.get("parameters", {})).items():
        if name == _ALL_BINARY:
            asked.all_binary = _check_bool(f"parameters.{name}", value)
        elif name.startswith("triton_"):
            raise HttpRefusal(400, "parameter keys starting with 'triton_' are reserved for Triton's own use")
        else:
            set_parameter(request, name, value)
    binary = _Tail(tail if header_length is not None else None)
    for i, tensor in enumerate(_check_list("inputs", given.get("inputs"))):
        _read_input(request, f"inputs[{i}]", tensor, binary)
    if binary.left:
        raise HttpRefusal(400, f"unexpected additional input data for model '{model}': {binary.left:,} bytes")
    for i, output in enumerate(_check_list("outputs", given.get("outputs", []))):
        _read_output(asked, f"outputs[{i}]", output)
    return asked


def write_infer(answer: service_pb2.ModelInferResponse, asked: InferRequest) -> tuple[bytes, int | None]:
    """Write the body of an answer. Also returns the bytes of its JSON, if binary tensors follow."""
    outputs, tail = [], []
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        content: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if asked.binary.get(output.name, asked.all_binary):
            content["parameters"] = {_SIZE: len(raw)}
            tail.append(raw)
        else:
            content["data"] = bytes_to_values(output, raw)
        outputs.append(content)
    head: dict[str, Any] = {"id": answer.id} if answer.id else {}
    head |= {"model_name": answer.model_name, "model_version": answer.model_version}
    if parameters := read_parameters(answer.parameters):
        head["parameters"] = parameters
    text = to_json(head | {"outputs": outputs})
    return b"".join((text, *tail)), len(text) if any(tail) else None


def to_json(content: Any) -> bytes:
    """Write JSON as Triton does: no spaces, UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def read_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of an answer, without Triton's own."""
    found = {}
    for name, value in parameters.items():
        chosen = value.WhichOneof("parameter_choice")
        if chosen and not name.startswith("triton_"):
            found[name] = getattr(value, chosen)
    return found


def set_parameter(request: service_pb2.ModelInferRequest, name: str, value: Any) -> None:
    """Set a parameter of a request, of the type that JSON has.

    Raises:
        HttpRefusal: when the value is not a text, number or bool.
    """
    if type(value) is bool:
        request.parameters[name].bool_param = value
    elif type(value) is int and -(2**63) <= value < 2**63:
        request.parameters[name].int64_param = value
    elif type(value) is int and 0 <= value < 2**64:
        request.parameters[name].uint64_param = value
    elif type(value) is float:
        request.parameters[name].double_param = value
    elif type(value) is str:
        request.parameters[name].string_param = _check_text(f"parameter {quote(name)}", value)
    else:
        raise HttpRefusal(400, f"parameter {quote(name)}: it must be 'int', 'bool', 'double' or 'string'")


class _Tail:
    """The binary tensors after the JSON, one after the other.

    Attributes:
        left: bytes that have not been read.
    """

    def __init__(self, content: bytes | None) -> None:
        """Start at the first tensor; None if the request has no such part."""
        self._content = content
        self.left = len(content or b"")

    def read(self, path: str, name: str, size: Any) -> bytes:
        """Read the next bytes.

        Raises:
            HttpRefusal: when there are not that many.
        """
        if type(size) is not int or size < 0:
            raise HttpRefusal(400, f"{path}.parameters.{_SIZE}: it must be a whole number of at least 0")
        if size and self._content is None:
            raise HttpRefusal(400, f"{path}: binary data needs the header Inference-Header-Content-Length")
        if size > self.left:
            more = str(size - self.left)[:20]
            raise HttpRefusal(400, f"unexpected size for input {quote(name)}, expecting {more} additional bytes")
        start = len(self._content or b"") - self.left
        self.left -= size
        return (self._content or b"")[start : start + size]


def _read_input(request: service_pb2.ModelInferRequest, path: str, given: Any, binary: _Tail) -> None:
    given = _check_object(path, given)
    for name in given:
        if name not in _INPUT_FIELDS:
            raise HttpRefusal(400, f"{path}: there is no field {quote(name)} (there are: {', '.join(_INPUT_FIELDS)})")
    name, datatype = (_check_text(f"{path}.{key}", given.get(key)) for key in ("name", "datatype"))
    shape = given.get("shape")
    if not isinstance(shape, list) or any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
        raise HttpRefusal(400, f"{path}.shape: it must be a list of whole numbers of at least 0")
    parameters = _check_object(f"{path}.parameters", given.get("parameters", {}))
    for parameter in parameters:
        if parameter != _SIZE:
            raise HttpRefusal(400, f"{path}: parameter {quote(parameter)} can't be given here")
    if ("data" in given) == (_SIZE in parameters):
        how = "both are" if "data" in given else "no field is"
        raise HttpRefusal(400, f"{path}: it has to have one of 'data' and 'parameters.{_SIZE}'; {how} set")
    tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
    if _SIZE in parameters:
        request.raw_input_contents.append(binary.read(path, name, parameters[_SIZE]))
        return
    if not isinstance(given["data"], list):
        raise HttpRefusal(400, f"{path}.data: it must be a list")
    values = flatten(given["data"])
    if math.prod(tensor.shape) != len(values):
        raise HttpRefusal(400, f"{path}: shape {quote_json(shape)} does not match the {len(values):,} values of 'data'")
    request.raw_input_contents.append(values_to_bytes(name, datatype, values))


def _read_output(asked: InferRequest, path: str, given: Any) -> None:
    given = _check_object(path, given)
    for name in given:
        if name not in ("name", "parameters"):
            raise HttpRefusal(400, f"{path}: there is no field {quote(name)} (there is: name, parameters)")
    name = _check_text(f"{path}.name", given.get("name"))
    parameters = _check_object(f"{path}.parameters", given.get("parameters", {}))
    for parameter in parameters:
        if parameter != _BINARY:
            raise HttpRefusal(400, f"{path}: parameter {quote(parameter)} can't be given here")
    asked.request.outputs.add().name = name
    asked.binary[name] = _check_bool(f"{path}.parameters.{_BINARY}", parameters.get(_BINARY, False))


def _check_object(path: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise HttpRefusal(400, f"{path}: it must be an object")
    return given


def _check_list(path: str, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise HttpRefusal(400, f"{path}: it must be a list")
    if len(given) > _MAX_TENSORS:
        raise HttpRefusal(400, f"{path}: {len(given):,}; a request may have {_MAX_TENSORS}")
    return given


def _check_text(path: str, given: Any) -> str:
    if not isinstance(given, str) or not given.isprintable():
        raise HttpRefusal(400, f"{path}: it must be a printable text")
    return given


def _check_bool(path: str, given: Any) -> bool:
    if type(given) is not bool:
        raise HttpRefusal(400, f"{path}: it must be true or false")
    return given
