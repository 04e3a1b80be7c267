"""KServe's /infer: JSON, or JSON with binary tensors behind it, to a request of gRPC, and the answer back."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2

from oarlock.serve.front.http.json_body import read_object
from oarlock.serve.front.http.refusal import HttpRefusal, as_json, shown
from oarlock.serve.front.rest.tensors import bytes_to_values, flat_values, values_to_bytes

_FIELDS = ("id", "parameters", "inputs", "outputs", "model_name", "model_version")
_INPUT_FIELDS = ("name", "shape", "datatype", "parameters", "data")
_SIZE, _BINARY, _ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"
_MOST_TENSORS = 64
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}  # of zlib: with the head of gzip, and of zlib itself
ENCODINGS = tuple(_WINDOW_BITS)


@dataclass
class InferQuestion:
    """What /infer is asked.

    Attributes:
        request: for Triton.
        binary: of each output that is named, whether it is to come as bytes.
        all_binary: the same of those that are not.
    """

    request: service_pb2.ModelInferRequest
    binary: dict[str, bool] = field(default_factory=dict)
    all_binary: bool = False


def unpacked(body: bytes, encoding: bytes, most_bytes: int) -> bytes:
    """A body without its Content-Encoding; no more than `most_bytes` of it are ever made.

    Raises:
        HttpRefusal: when there is more, or it is damaged.
    """
    if encoding not in _WINDOW_BITS:
        return body
    unpacker = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        content = unpacker.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise HttpRefusal(400, f"the body is not valid {encoding.decode()}: {error}") from error
    if len(content) > most_bytes:
        raise HttpRefusal(413, f"the request is larger than {most_bytes:,} bytes when it is unpacked")
    if not unpacker.eof or unpacker.unused_data:
        raise HttpRefusal(400, f"the body is not complete {encoding.decode()}")
    return content


def read_infer(body: bytes, header_length: bytes | None, model: str, version: str) -> InferQuestion:
    """A body of /infer; the tensors themselves are checked afterwards, with those that come over gRPC.

    Args:
        header_length: bytes of the JSON, before binary tensors; None for all.

    Raises:
        HttpRefusal: naming what is wrong.
    """
    head, tail = _split(body, header_length)
    given = read_object(head)
    for name in given:
        if name not in _FIELDS:
            raise HttpRefusal(400, f"{shown(name)}: there is no such field here (there are: {', '.join(_FIELDS)})")
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    if "id" in given:
        request.id = _text("id", given["id"])
    question = InferQuestion(request)
    _read_parameters(question, given.get("parameters", {}))
    binary = _Tail(tail if header_length is not None else None)
    for i, tensor in enumerate(_list("inputs", given.get("inputs"))):
        _read_input(request, f"inputs[{i}]", tensor, binary)
    if binary.left:
        raise HttpRefusal(400, f"unexpected additional input data for model '{model}': {binary.left:,} bytes")
    for i, output in enumerate(_list("outputs", given.get("outputs", []))):
        _read_output(question, f"outputs[{i}]", output)
    return question


def write_infer(answer: service_pb2.ModelInferResponse, question: InferQuestion) -> tuple[bytes, int | None]:
    """The body of an answer, and how many bytes of it are JSON where binary tensors follow."""
    outputs, tail = [], []
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        told: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if question.binary.get(output.name, question.all_binary):
            told["parameters"] = {_SIZE: len(raw)}
            tail.append(raw)
        else:
            told["data"] = bytes_to_values(output, raw)
        outputs.append(told)
    content: dict[str, Any] = {"id": answer.id} if answer.id else {}
    content |= {"model_name": answer.model_name, "model_version": answer.model_version}
    if parameters := parameter_values(answer.parameters):
        content["parameters"] = parameters
    head = to_json(content | {"outputs": outputs})
    return b"".join((head, *tail)), len(head) if any(tail) else None


def to_json(content: Any) -> bytes:
    """As Triton writes it: no spaces, UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def parameter_values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Of an answer, but for Triton's own."""
    found = {}
    for name, value in parameters.items():
        chosen = value.WhichOneof("parameter_choice")
        if chosen and not name.startswith("triton_"):
            found[name] = getattr(value, chosen)
    return found


def set_parameter(request: service_pb2.ModelInferRequest, name: str, value: Any) -> None:
    """A parameter of a request, of the type that JSON has.

    Raises:
        HttpRefusal: for what is neither text, number nor truth.
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
        request.parameters[name].string_param = _text(f"parameter {shown(name)}", value)
    else:
        raise HttpRefusal(400, f"parameter {shown(name)}: it has to be 'int', 'bool', 'double' or 'string'")


def _split(body: bytes, header_length: bytes | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    if not header_length.isdigit() or len(header_length) > 12 or int(header_length) > len(body):
        told = shown(header_length.decode("latin-1"))
        raise HttpRefusal(400, f"inference header size should be in range (0, {len(body)}), got: {told}")
    length = int(header_length)
    if not length:
        raise HttpRefusal(400, "a body of one raw tensor alone is not read here: send its name, shape and datatype")
    return body[:length], body[length:]


class _Tail:
    """What stands behind the JSON: binary tensors, one after the other."""

    def __init__(self, content: bytes | None) -> None:
        """None where the request has no such part."""
        self._content, self._place = content, 0

    @property
    def left(self) -> int:
        """Bytes that no input has taken."""
        return len(self._content or b"") - self._place

    def take(self, path: str, name: str, size: Any) -> bytes:
        """The next so many bytes.

        Raises:
            HttpRefusal: when there are not as many.
        """
        if type(size) is not int or size < 0:
            raise HttpRefusal(400, f"{path}.parameters.{_SIZE}: it has to be a whole number of at least 0")
        if size and self._content is None:
            raise HttpRefusal(400, f"{path}: binary data needs the header Inference-Header-Content-Length")
        if size > self.left:
            more = str(size - self.left)[:20]
            raise HttpRefusal(400, f"unexpected size for input {shown(name)}, expecting {more} additional bytes")
        self._place += size
        return (self._content or b"")[self._place - size : self._place]


def _read_parameters(question: InferQuestion, given: Any) -> None:
    for name, value in _object("parameters", given).items():
        if name == _ALL_BINARY:
            question.all_binary = _truth(f"parameters.{name}", value)
        elif name.startswith("triton_"):
            raise HttpRefusal(400, "parameter keys starting with 'triton_' are reserved for Triton's own use")
        else:
            set_parameter(question.request, name, value)


def _read_input(request: service_pb2.ModelInferRequest, path: str, given: Any, binary: _Tail) -> None:
    given = _object(path, given)
    for name in given:
        if name not in _INPUT_FIELDS:
            raise HttpRefusal(400, f"{path}: there is no field {shown(name)} (there are: {', '.join(_INPUT_FIELDS)})")
    name, datatype = (_text(f"{path}.{key}", given.get(key)) for key in ("name", "datatype"))
    shape = given.get("shape")
    if not isinstance(shape, list) or any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
        raise HttpRefusal(400, f"{path}.shape: it has to be a list of whole numbers of at least 0")
    parameters = _object(f"{path}.parameters", given.get("parameters", {}))
    for parameter in parameters:
        if parameter != _SIZE:
            raise HttpRefusal(400, f"{path}: parameter {shown(parameter)} can't be given here")
    if ("data" in given) == (_SIZE in parameters):
        how = "both are" if "data" in given else "no field is"
        raise HttpRefusal(400, f"{path}: it has to have one of 'data' and 'parameters.{_SIZE}'; {how} set")
    tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
    if _SIZE in parameters:
        request.raw_input_contents.append(binary.take(path, name, parameters[_SIZE]))
        return
    if not isinstance(given["data"], list):
        raise HttpRefusal(400, f"{path}.data: it has to be a list")
    values = flat_values(given["data"])
    if math.prod(tensor.shape) != len(values):
        raise HttpRefusal(400, f"{path}: shape {as_json(shape)} does not match the {len(values):,} values of 'data'")
    request.raw_input_contents.append(values_to_bytes(name, datatype, values))


def _read_output(question: InferQuestion, path: str, given: Any) -> None:
    given = _object(path, given)
    for name in given:
        if name not in ("name", "parameters"):
            raise HttpRefusal(400, f"{path}: there is no field {shown(name)} (there is: name, parameters)")
    name = _text(f"{path}.name", given.get("name"))
    parameters = _object(f"{path}.parameters", given.get("parameters", {}))
    for parameter in parameters:
        if parameter != _BINARY:
            raise HttpRefusal(400, f"{path}: parameter {shown(parameter)} can't be given here")
    question.request.outputs.add().name = name
    question.binary[name] = _truth(f"{path}.parameters.{_BINARY}", parameters.get(_BINARY, False))


def _object(path: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise HttpRefusal(400, f"{path}: it has to be an object")
    return given


def _list(path: str, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise HttpRefusal(400, f"{path}: it has to be a list")
    if len(given) > _MOST_TENSORS:
        raise HttpRefusal(400, f"{path}: {len(given):,}; a request may have {_MOST_TENSORS}")
    return given


def _text(path: str, given: Any) -> str:
    if not isinstance(given, str) or not given.isprintable():
        raise HttpRefusal(400, f"{path}: it has to be a text that can be printed")
    return given


def _truth(path: str, given: Any) -> bool:
    if type(given) is not bool:
        raise HttpRefusal(400, f"{path}: it has to be true or false")
    return given
