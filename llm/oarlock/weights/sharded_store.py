"""Tensors stored in shards: the format of a checkpoint's weights and optimizer states.

Every rank writes one safetensors file with what it holds, and tensors.json describes which shard of which whole tensor
each entry is. Names and shapes are those of the model on one card, so any plan with any number of ranks reads what any
other wrote. (PaddleNLP's unified checkpoint gathers tensor-parallel shards before it writes, does not support stage 3,
and keeps states in pickles.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from oarlock.errors import CheckpointError
from oarlock.formats.links import check_links
from oarlock.weights.safetensors_file import SafetensorsFile
from oarlock.weights.shard_index import INDEX, MASTER, WEIGHTS, StoredShard, read_index
from oarlock.weights.tensor_slice import TensorSlice

_CHUNK = 1 << 24  # bytes read at a time where rows of a slice are scattered over the tensor


@dataclass
class ShardedStore:
    """The tensors of a folder, assembled on demand.

    Attributes:
        where: key -> the shards of that tensor and their files.
    """

    folder: Path
    where: dict[str, list[tuple[Path, StoredShard]]]
    _open: dict[Path, SafetensorsFile] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(cls, folder: str | Path) -> ShardedStore:
        """Read the index.

        Raises:
            CheckpointError: when it is missing or not understood.
        """
        folder = Path(folder)
        check_links(folder, error=CheckpointError)
        where = read_index(folder)
        return cls(folder, where)

    def __enter__(self) -> ShardedStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._open.clear()

    def check(self, listed: Collection[str]) -> None:
        """Compare the index with the headers of the files, and with a list of the folder's files.

        Raises:
            CheckpointError: naming what does not fit.
        """
        in_files = {path.name for stored in self.where.values() for path, _ in stored}
        files = {name for name in listed if name.endswith(".safetensors")}
        for name in sorted(in_files ^ files):
            where, without = (INDEX, "the list of files") if name in in_files else ("the list of files", INDEX)
            if name in in_files or self._file(self.folder / name).tensors:
                raise CheckpointError(f"{self.folder}: {name} is in {where} and not in {without}")
        for stored in self.where.values():
            types = {self._dtype(path, shard) for path, shard in stored}
            if len(types) > 1:
                path, shard = stored[-1]
                raise CheckpointError(f"{path}: {shard.key} differs in type from its other shards")
        # Each state of the optimizer covers the same weights, in their shape or as one number.
        names = {kind: set(self.names(kind)) for kind in self.kinds}
        weights = names.pop(WEIGHTS, set())
        names.pop(MASTER, None)
        for kind, having in names.items():
            lacking = next((other - having for other in names.values() if other - having), having - weights)
            if lacking:
                raise CheckpointError(f"{self.folder / INDEX}: {kind} and the other states are not of the same weights")
            for name in having:
                shape, dtype = self.shape(kind, name), self._dtype(*self._find_shards(kind, name)[0])
                if shape not in (self.shape(WEIGHTS, name), (1,)) or dtype.kind not in "fV":
                    raise CheckpointError(
                        f"{self.folder / INDEX}: {kind}/{name} is {list(shape)} of {dtype.name}, not a state of a "
                        f"weight of {list(self.shape(WEIGHTS, name))}"
                    )

    def names(self, kind: str = WEIGHTS) -> Iterator[str]:
        """Names of all tensors of a kind."""
        prefix = f"{kind}/"
        return (key.removeprefix(prefix) for key in self.where if key.startswith(prefix))

    @property
    def kinds(self) -> list[str]:
        """All kinds, weights first."""
        found = {key.partition("/")[0] for key in self.where}
        return sorted(found, key=lambda kind: (kind != WEIGHTS, kind))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._find_shards(kind, name)[0][1].slice.shape

    def dtype(self, kind: str, name: str) -> str:
        """NumPy's name of the stored type, or "bfloat16".

        Raises:
            CheckpointError: when it is not stored, or its file can't be read.
        """
        return self._dtype(*self._find_shards(kind, name)[0]).name

    def read(self, name: str, kind: str = WEIGHTS) -> np.ndarray:
        """Read a whole tensor.

        Raises:
            CheckpointError: when it is not stored, or incomplete.
        """
        return self.read_slice(kind, name, TensorSlice(self.shape(kind, name)))

    def read_slice(
        self, kind: str, name: str, tensor_slice: TensorSlice, flat: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Read a slice of a tensor, or a range of the flattened slice.

        Only files that have some of it are read. Besides the result, a chunk is in memory; for a range of a slice that
        is not
        stored as such, the slice.

        Raises:
            CheckpointError: when it is not stored, incomplete, or of another shape.
        """
        stored = self._find_shards(kind, name)
        shape = next((shard.slice.shape for _, shard in stored if shard.slice.shape != tensor_slice.shape), None)
        if shape is not None:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} is {list(shape)}, the model's is {list(tensor_slice.shape)}"
            )
        dtype = self._dtype(*stored[0])
        same = [(path, shard) for path, shard in stored if shard.slice == tensor_slice]
        if not same:
            part = self._from_other_slices(stored, tensor_slice, dtype)
            return part if flat is None else part.reshape(-1)[slice(*flat)]
        start, stop = flat or (0, math.prod(tensor_slice.local_shape))
        values = np.empty([stop - start], dtype)
        self._read_range(same, start, values)
        return values.reshape(tensor_slice.local_shape) if flat is None else values

    def _from_other_slices(
        self, stored: list[tuple[Path, StoredShard]], wanted: TensorSlice, dtype: np.dtype
    ) -> np.ndarray:
        """Assemble a slice from slices that were cut differently."""
        slices: dict[TensorSlice, list[tuple[Path, StoredShard]]] = {}
        for path, shard in stored:
            slices.setdefault(shard.slice, []).append((path, shard))
        axes = {tensor_slice.axis for tensor_slice in (*slices, wanted) if tensor_slice.axis is not None}
        if len(axes) > 1:  # PaddleNLP splits a tensor along the same axis whatever the degree
            if wanted.axis is None:
                raise CheckpointError(f"{self.folder}: {stored[0][1].key} is stored in slices along several axes")
            return np.ascontiguousarray(wanted.cut(self._from_other_slices(stored, TensorSlice(wanted.shape), dtype)))
        axis = axes.pop()
        part = np.empty(wanted.local_shape, dtype)
        filled = np.zeros(part.shape[axis], bool)
        for tensor_slice, shards in slices.items():
            for start, target, length in _common_runs(tensor_slice, wanted, axis):
                if not filled[target : target + length].all():
                    self._copy_run(shards, axis, start, part, target, length)
                filled[target : target + length] = True
        if not filled.all():
            raise self._incomplete(stored)
        return part

    def _copy_run(
        self, shards: list[tuple[Path, StoredShard]], axis: int, start: int, part: np.ndarray, target: int, length: int
    ) -> None:
        """Copy indices [start, start + length) along an axis of a stored slice to `target` on in `part`."""
        local_shape = shards[0][1].slice.local_shape
        inner = math.prod(local_shape[axis + 1 :])
        row = local_shape[axis] * inner  # elements per index of the preceding axes, contiguous in the file
        rows = part.reshape(-1, part.shape[axis], inner)
        at_once = max(1, _CHUNK // (row * part.itemsize))
        if len(rows) == 1 or row * part.itemsize > _CHUNK:
            for i, values in enumerate(rows):
                self._read_range(shards, i * row + start * inner, values[target : target + length].reshape(-1))
            return
        for i in range(0, len(rows), at_once):
            taken = rows[i : i + at_once]
            buffer = np.empty([len(taken), local_shape[axis], inner], part.dtype)
            self._read_range(shards, i * row, buffer.reshape(-1))
            taken[:, target : target + length] = buffer[:, start : start + length]

    def _read_range(self, shards: list[tuple[Path, StoredShard]], start: int, values: np.ndarray) -> None:
        """Read elements of a flattened slice, from `start` on, from the shards that have them."""
        position, stop = start, start + len(values)
        for path, shard in sorted(shards, key=lambda item: item[1].range):
            first, last = shard.range
            if first <= position < min(last, stop):
                if self._dtype(path, shard) != values.dtype:
                    raise CheckpointError(
                        f"{path}: {shard.key} is not of type {values.dtype.name} like its other shards"
                    )
                taken = values[position - start : min(last, stop) - start]
                try:
                    self._file(path).read(shard.key, position - first, taken)
                except (OSError, ValueError) as error:
                    raise CheckpointError(f"{path}: {shard.key} can't be read: {error}") from error
                position += len(taken)
        if position < stop:
            raise self._incomplete(shards)

    def _incomplete(self, shards: list[tuple[Path, StoredShard]]) -> CheckpointError:
        shard = shards[0][1]
        return CheckpointError(f"{self.folder}: {shard.kind} of {shard.name} is incomplete")

    def _find_shards(self, kind: str, name: str) -> list[tuple[Path, StoredShard]]:
        found = self.where.get(f"{kind}/{name}")
        if not found:
            raise CheckpointError(f"{self.folder}: no {kind} of {name} is stored in this checkpoint")
        return found

    def _dtype(self, path: Path, shard: StoredShard) -> np.dtype:
        """The type of a shard, after a check of its size."""
        tensor = self._file(path).tensors.get(shard.key)
        start, stop = shard.range
        if tensor is None or math.prod(tensor.shape) != stop - start:
            found = "missing" if tensor is None else f"{list(tensor.shape)}"
            raise CheckpointError(f"{path}: {shard.key} is {found}, {INDEX} says {stop - start:,} elements")
        return tensor.dtype

    def _file(self, path: Path) -> SafetensorsFile:
        if path not in self._open:
            self._open[path] = self._stack.enter_context(SafetensorsFile(path, CheckpointError))
        return self._open[path]


def _common_runs(stored: TensorSlice, wanted: TensorSlice, axis: int) -> Iterator[tuple[int, int, int]]:
    """Yield what two slices share along an axis: (index in the stored slice, index in the wanted slice, length)."""
    all_of_it = ((0, stored.shape[axis]),)
    begin = 0
    for start, length in stored.runs or all_of_it:
        target = 0
        for wanted_start, wanted_length in wanted.runs or all_of_it:
            first, last = max(start, wanted_start), min(start + length, wanted_start + wanted_length)
            if first < last:
                yield begin + first - start, target + first - wanted_start, last - first
            target += wanted_length
        begin += length
