"""Converts tensors between lists of values, as in KServe's JSON, and bytes, as in gRPC and binary bodies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from oarlock.serve.front.http.refusal import HttpRefusal, quote, quote_json

# datatype -> NumPy's type, little endian as in Triton.
NUMPY_TYPES: dict[str, str] = {
    "BOOL": "|b1",
    **{f"UINT{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    "FP32": "<f4",
    "FP64": "<f8",
}
_ONLY_BINARY = ("FP16", "BF16")


def flatten(data: Any) -> list[Any]:
    """The values of nested lists, in order. A value that is not a list becomes a list of one."""
    if not isinstance(data, list):
        return [data]
    while any(isinstance(item, list) for item in data):  # each round removes a level
        data = [value for item in data for value in (item if isinstance(item, list) else (item,))]
    return data


def values_to_bytes(name: str, datatype: str, values: Sequence[Any]) -> bytes:
    """Convert values to the contents of a tensor.

    Raises:
        HttpRefusal: naming the input and the first value that does not fit it.
    """
    if datatype == "BYTES":
        pieces = []
        for value in values:
            if type(value) is not str:
                raise HttpRefusal(400, f"{name}: it must be a text; got {quote_json(value)}")
            try:
                text = value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise HttpRefusal(400, f"{name}: not valid Unicode: {error.reason}") from error
            pieces += [len(text).to_bytes(4, "little"), text]
        return b"".join(pieces)
    if datatype in _ONLY_BINARY:
        raise HttpRefusal(400, f"{name}: {datatype} does not go through JSON; send it as binary data")
    if datatype not in NUMPY_TYPES:
        raise HttpRefusal(400, f"{name}: there is no datatype {quote(datatype)}")
    kind = np.dtype(NUMPY_TYPES[datatype])
    if kind.kind == "b":
        _check_kinds(name, values, (bool,), "true or false")
    elif kind.kind == "f":
        _check_kinds(name, values, (int, float), "a number")
        with np.errstate(over="ignore"):  # infinite values are refused by the check of the whole request
            return np.array(values, np.float64).astype(kind).tobytes()
    else:
        _check_kinds(name, values, (int,), "a whole number")
        limits = np.iinfo(kind)
        wrong = next((value for value in values if not limits.min <= value <= limits.max), None)
        if wrong is not None:
            raise HttpRefusal(400, f"{name}: {quote_json(wrong)} does not fit {datatype}")
    return np.array(values, kind).tobytes()


def bytes_to_values(output: service_pb2.ModelInferResponse.InferOutputTensor, raw: bytes) -> list[Any]:
    """Convert the contents of an output to its values, in one list.

    Raises:
        HttpRefusal: 500, when JSON has no such type.
    """
    if output.datatype == "BYTES":
        texts: list[Any] = []
        start = 0
        for _ in range(math.prod(output.shape)):
            end = start + 4 + int.from_bytes(raw[start : start + 4], "little")
            texts.append(raw[start + 4 : end].decode("utf-8", "replace"))
            start = end
        return texts
    if output.datatype not in NUMPY_TYPES:
        raise HttpRefusal(500, f"output {output.name}: {output.datatype} does not go through JSON; ask for binary data")
    values: list[Any] = np.frombuffer(raw, NUMPY_TYPES[output.datatype]).tolist()
    return values


def _check_kinds(name: str, values: Sequence[Any], kinds: tuple[type, ...], words: str) -> None:
    """Check the exact type: true is not a number here."""
    if set(map(type, values)) <= set(kinds):
        return
    wrong = next(value for value in values if type(value) not in kinds)
    raise HttpRefusal(400, f"{name}: it must be {words}; got {quote_json(wrong)}")
