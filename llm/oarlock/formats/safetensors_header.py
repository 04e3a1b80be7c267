"""Reading the header of a safetensors file, as strictly as its specification (huggingface/safetensors, README)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from oarlock.errors import ModelError, OarlockError
from oarlock.formats.files import open_regular
from oarlock.formats.json_file import parse_json

# Bits per element.
DTYPES = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the specification
MAX_SIZE = 1 << 48  # elements along an axis: more than any disk holds, and far from overflowing 64 bits
MAX_AXES = 16
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: dtype, shape, and its bytes from `start` to `end`, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, in the order of the file, and the metadata of its writer."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(source: str | Path | BinaryIO, *, name: str = "", error: type[OarlockError] = ModelError) -> Header:
    """The header of a safetensors file; nothing of the tensors is read.

    Args:
        source: a path, or a file that is open for reading (its position moves behind the header).
        name: for messages, where `source` is no path.

    Raises:
        OarlockError: of the class given, unless the tensors' bytes follow one another without hole or overlap to the
            end of the file, each as many as dtype and shape say.
    """
    if isinstance(source, (str, Path)):
        with open_regular(source, error=error) as file:
            return read_header(file, name=name or str(source), error=error)
    name = name or str(getattr(source, "name", "file"))
    try:
        size = os.fstat(source.fileno()).st_size
        source.seek(0)
        length = int.from_bytes(source.read(8), "little")
        if size < 8 or length > size - 8:
            raise error(f"{name}: not a safetensors file, or a truncated one")
        if length > MAX_HEADER_BYTES:
            raise error(f"{name}: a header of {length:,} bytes is too large (at most {MAX_HEADER_BYTES:,})")
        text = source.read(length)
    except OSError as problem:
        raise error(f"{name}: {problem.strerror}") from problem
    return parse_header(text, size - 8 - length, name, error=error)


def parse_header(text: bytes, data_bytes: int, name: str, *, error: type[OarlockError] = ModelError) -> Header:
    """Parse the JSON of a header, as read_header does.

    Args:
        data_bytes: number of bytes after the header.
    """
    if not text.startswith(b"{"):
        raise error(f"{name}: not a safetensors file (its header is not a JSON object)")
    content = parse_json(text, f"{name} (header)", dict[str, Any], limit=MAX_HEADER_BYTES, depth=4, error=error)
    metadata = content.pop(_METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"{name}: {_METADATA} of the header must be an object of strings")
    first = 8 + len(text)
    tensors = {key: _entry(key, entry, first, data_bytes, name, error) for key, entry in content.items()}
    at, before = first, "the header"
    for key, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            what = "overlaps" if entry.start < at else "leaves a gap after"
            raise error(f"{name}: tensor {key[:200]!r} {what} {before}")
        at, before = entry.end, f"tensor {key[:200]!r}"
    if at != first + data_bytes:
        raise error(f"{name}: {first + data_bytes - at:,} bytes after {before} belong to no tensor")
    return Header(tensors, metadata)


def _entry(
    key: str, entry: Any, first: int, data_bytes: int, name: str, error: type[OarlockError]
) -> TensorEntry:  # fmt: skip
    where = f"{name}: tensor {key[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where}: its header entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise error(f"{where}: {str(dtype)[:40]} is not a safetensors dtype")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_size, shape)):
        raise error(f"{where}: its shape must be a list of at most {MAX_AXES} sizes; got {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise error(f"{where}: its data_offsets must be [begin, end]; got {str(offsets)[:80]}")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise error(
            f"{where}: its bytes {begin:,} to {end:,} are outside the file, which has {data_bytes:,} bytes of data"
        )
    bits = math.prod(shape) * DTYPES[dtype]
    if bits != 8 * (end - begin):
        raise error(f"{where}: {end - begin:,} bytes, but {dtype} of shape {shape} takes {-(-bits // 8):,}")
    return TensorEntry(dtype, tuple(shape), first + begin, first + end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE
