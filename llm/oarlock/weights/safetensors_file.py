"""Write and read safetensors files with memory for one tensor at a time.

The library's save_file needs all tensors at once, and pages of the files it maps count as memory of the process. The
format (https://github.com/huggingface/safetensors#format): the header's length as 8 little-endian bytes, a JSON header
with dtype, shape and offsets, then the data without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from oarlock.errors import ModelError, OarlockError
from oarlock.formats.files import open_regular
from oarlock.formats.safetensors_header import read_header
from oarlock.weights.buffers import array_type, copy_array, row_ranges

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_NUMPY = {code: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name, code in _DTYPES.items()}
_NUMPY["U16"] = _NUMPY["BF16"]  # PaddleNLP's save_pretrained writes this for bfloat16
_SIZES = {name: _NUMPY[code].itemsize for name, code in _DTYPES.items()}
_BITS = {"bfloat16": "uint16"}
_CHUNK = 8 << 20  # bytes converted and hashed at a time; with fewer, the threads wait for each other
_WRITE_BYTES = 1 << 20  # per write; larger writes are slower
_MAX_UNHASHED = 2  # chunks that may be written before the first of them is hashed
_SYNC_BYTES = 32 << 20  # written between two syncs
_READ_BYTES = 2 << 20  # per thread and read
_PREFETCH_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written.

    Attributes:
        name: in the file.
        dtype: NumPy's name of it, or "bfloat16".
        shape: of the tensor.
        read: returns the values (bfloat16 as ml_dtypes.bfloat16 or as the same bits in uint16), in any memory layout.
        cast: the values may have another float type and are rounded to this one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    cast: bool = False

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * _SIZES[self.dtype]


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file, for a manifest."""

    num_bytes: int
    sha256: str


def find_main_dtype(tensors: Sequence[TensorSource]) -> str:
    """The type of most of the weights by size, for the configuration saved with them."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.num_bytes
    return sizes.most_common(1)[0][0]


def sort_for_file(tensors: Sequence[TensorSource]) -> list[TensorSource]:
    """Sort by decreasing width of the type, as the library does, so that tensors are aligned to their elements."""
    return sorted(tensors, key=lambda tensor: (-_SIZES[tensor.dtype], tensor.name))


def write_safetensors(
    path: Path,
    tensors: Sequence[TensorSource],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> FileRecord:
    """Write a file and sync it to disk.

    Args:
        metadata: strings for the header, for example {"format": "np"}.
        progress: called with the bytes of each tensor once it is written.

    Raises:
        OSError: when it can't be written.
        ValueError: when a tensor does not match its source's description.
    """
    ordered = sort_for_file(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.num_bytes
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[tensor.name], offset = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, _HashedFile(file) as out:
        out.put(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            _put(out, tensor)
            if progress is not None:
                progress(tensor.num_bytes)
        out.drain()
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(8 + len(text) + offset, out.digest.hexdigest())


def _put(out: _HashedFile, tensor: TensorSource) -> None:
    """Write a tensor, in chunks of rows where they have to be transposed or rounded.

    Raises:
        ValueError: when it does not match its source's description.
    """
    values = tensor.read()
    same = values.dtype.name in (tensor.dtype, _BITS.get(tensor.dtype))
    if values.shape != tensor.shape or not (same or (tensor.cast and values.dtype.kind in "fV")):
        found = f"{values.dtype.name} {list(values.shape)}"
        raise ValueError(f"{tensor.name} has {found}, expected {tensor.dtype} {list(tensor.shape)}")
    if same and (values.flags.c_contiguous or not values.ndim):
        data = values.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _CHUNK):
            out.put(data[start : start + _CHUNK])
        out.drain()  # the next call of read() may overwrite these values
        return
    dtype = values.dtype if same else array_type(tensor.dtype)
    for begin, end in row_ranges(values.shape, dtype.itemsize, _CHUNK):
        rows = np.empty((end - begin, *values.shape[1:]), dtype) if values.ndim else np.empty((), dtype)
        copy_array(rows, values[begin:end] if values.ndim else values)
        out.put(rows.reshape(-1).view(np.uint8).data)


class _HashedFile:
    """A file that one thread hashes and another syncs to disk while it is written.

    Attributes:
        digest: of everything written.
    """

    def __init__(self, file: Any) -> None:
        self.digest = hashlib.sha256()
        self._file, self._unsynced = file, 0
        self._hash, self._sync = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None
        self._hashing: deque[Future[None]] = deque()

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for pool in (self._hash, self._sync):
            pool.shutdown(cancel_futures=error is not None)

    def put(self, chunk: bytes | memoryview) -> None:
        """Append a chunk, whose memory must not change until drain()."""
        self._hashing.append(self._hash.submit(self.digest.update, chunk))
        self._write(chunk)
        self._wait(_MAX_UNHASHED)

    def drain(self) -> None:
        """Wait until everything is hashed."""
        self._wait(0)

    def _write(self, chunk: bytes | memoryview) -> None:
        for start in range(0, len(chunk), _WRITE_BYTES):
            self._file.write(chunk[start : start + _WRITE_BYTES])
        self._unsynced += len(chunk)
        if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._syncing, self._unsynced = self._sync.submit(os.fdatasync, self._file.fileno()), 0

    def _wait(self, most: int) -> None:
        while len(self._hashing) > most:
            self._hashing.popleft().result()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it.

    Attributes:
        dtype: ml_dtypes.bfloat16 for BF16.
        offset: of its first byte in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A file whose tensors are read in ranges, with plain reads.

    Args:
        error: class of the errors about its header.

    Attributes:
        tensors: name -> description.

    Raises:
        OarlockError: naming the file, when it is missing, not a regular file, damaged (see oarlock.formats), or has a
            type
            that NumPy lacks.
    """

    def __init__(self, path: Path, error: type[OarlockError] = ModelError) -> None:
        self._file = open_regular(path, error=error)
        self._prefetched = 0  # end of the range that the kernel was asked to prefetch
        try:
            entries = read_header(self._file, name=str(path), error=error).tensors
            odd = next((name for name, entry in entries.items() if entry.dtype not in _NUMPY), None)
            if odd is not None:
                raise error(f"{path}: {odd} is of type {entries[odd].dtype}, which is not supported")
            self.tensors = {
                name: StoredTensor(_NUMPY[entry.dtype], entry.shape, entry.start) for name, entry in entries.items()
            }
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str, start: int, into: np.ndarray, threads: Executor | None = None) -> None:
        """Read elements of a flattened tensor, from `start` on, until a contiguous array of its type is full.

        Args:
            threads: to read with. Several are faster, both from a disk and from memory (the pages of `into` may be
                new).
        """
        tensor = self.tensors[name]
        offset = tensor.offset + start * tensor.dtype.itemsize
        rest = into.reshape(-1).view(np.uint8).data
        ranges = [(offset + at, rest[at : at + _READ_BYTES]) for at in range(0, len(rest), _READ_BYTES)]
        if threads is not None:
            # Prefetch beyond the end: to the kernel, several readers at once look like random access.
            end = offset + len(rest)
            if self._prefetched < end + _PREFETCH_BYTES // 2:
                begin = max(end, self._prefetched)
                self._prefetched = end + _PREFETCH_BYTES
                size = self._prefetched - begin
                threads.submit(os.posix_fadvise, self._file.fileno(), begin, size, os.POSIX_FADV_WILLNEED)
        list((map if threads is None or len(ranges) == 1 else threads.map)(self._read_range, ranges))

    def _read_range(self, byte_range: tuple[int, memoryview]) -> None:
        offset, rest = byte_range
        while rest:
            done = os.preadv(self._file.fileno(), [rest], offset)
            if not done:
                raise ValueError("the file ends too early")
            rest, offset = rest[done:], offset + done
