"""tensors.json: which shard of which whole tensor each entry of a checkpoint's files is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from typing_extensions import NotRequired, TypedDict

from oarlock.errors import CheckpointError
from oarlock.formats.json_file import read_json
from oarlock.weights.tensor_slice import TensorSlice

INDEX = "tensors.json"
WEIGHTS = "model"  # the kind of tensor that is a weight; other kinds are optimizer states ("moment1", "master", ...)
MASTER = "master"  # float32 copies of half-precision weights (the optimizer's _master_weights)
# 512 ranks with four shards each of 700 tensors take 150 MB, and 4 million objects and lists.
_INDEX_BYTES, _INDEX_CONTAINERS = 1 << 29, 10_000_000
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_Whole = Annotated[int, Ge(0)]


class _Entry(TypedDict):
    """A shard in tensors.json."""

    shape: list[_Whole]
    axis: NotRequired[_Whole]
    runs: NotRequired[list[tuple[_Whole, _Whole]]]
    flat: NotRequired[tuple[_Whole, _Whole]]


@dataclass(frozen=True)
class StoredShard:
    """A stored shard of a whole tensor.

    Attributes:
        kind: WEIGHTS, or the name of an optimizer state.
        name: of the parameter, as on one card.
        slice: the tensor-parallel slice it belongs to.
        flat: (start, stop) in the flattened slice, where stage 3 shards it; None for all of it.
    """

    kind: str
    name: str
    slice: TensorSlice
    flat: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.kind}/{self.name}"

    @property
    def range(self) -> tuple[int, int]:
        """(start, stop) in the flattened slice."""
        return self.flat or (0, math.prod(self.slice.local_shape))

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"shape": list(self.slice.shape)}
        if self.slice.axis is not None:
            content |= {"axis": self.slice.axis, "runs": [list(run) for run in self.slice.runs]}
        if self.flat is not None:
            content["flat"] = list(self.flat)
        return content

    @classmethod
    def from_json(cls, key: str, content: Mapping[str, Any]) -> StoredShard:
        kind, _, name = key.partition("/")
        runs = tuple((int(start), int(length)) for start, length in content.get("runs", ()))
        flat = content.get("flat")
        tensor_slice = TensorSlice(tuple(content["shape"]), content.get("axis"), runs)
        return cls(kind, name, tensor_slice, (int(flat[0]), int(flat[1])) if flat else None)

    def find_problem(self) -> str | None:
        """Explain why no tensor can have such a shard; None if one can."""
        shape, axis, runs = self.slice.shape, self.slice.axis, self.slice.runs
        if not self.kind or not self.name:
            return "has no kind and name"
        if (axis is None) != (not runs) or (axis is not None and axis >= len(shape)):
            return f"can't be cut along axis {axis} of {list(shape)}"
        if axis is not None:
            ordered = sorted(runs)
            ends = [start + length for start, length in ordered]
            starts = [*(start for start, _ in ordered[1:]), shape[axis]]
            if any(end > following for end, following in zip(ends, starts, strict=True)):
                return f"has runs that overlap, or leave the {shape[axis]:,} of axis {axis}"
        start, stop = self.range
        if not 0 <= start <= stop <= math.prod(self.slice.local_shape):
            return f"can't be elements {start:,} to {stop:,} of {math.prod(self.slice.local_shape):,}"
        return None


def shard_file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def write_index(folder: Path, shards_by_file: Mapping[str, list[StoredShard]]) -> None:
    """Write tensors.json: file -> key -> shard."""
    content = {
        file: {shard.key: shard.to_json() for shard in shards} for file, shards in sorted(shards_by_file.items())
    }
    (folder / INDEX).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_index(folder: Path) -> dict[str, list[tuple[Path, StoredShard]]]:
    """Read tensors.json.

    Returns:
        Key -> the shards of that tensor and their files.

    Raises:
        CheckpointError: when it is missing, or describes what no tensor can be.
    """
    index = folder / INDEX
    content = read_json(
        index,
        dict[str, dict[str, _Entry]],
        error=CheckpointError,
        limit=_INDEX_BYTES,
        containers=_INDEX_CONTAINERS,
        extra="forbid",
    )
    where: dict[str, list[tuple[Path, StoredShard]]] = {}
    for file, entries in content.items():
        if not _FILE.fullmatch(file):
            raise CheckpointError(f"{index}: {file!r} is not the name of a safetensors file in this folder")
        for key, entry in entries.items():
            shard = StoredShard.from_json(key, entry)
            if problem := shard.find_problem():
                raise CheckpointError(f"{index}: {key} in {file} {problem}")
            where.setdefault(key, []).append((folder / file, shard))
    for key, stored in where.items():
        shape = stored[0][1].slice.shape
        other = next((shard.slice.shape for _, shard in stored if shard.slice.shape != shape), None)
        if other is not None:
            raise CheckpointError(f"{index}: {key} is {list(shape)} in one shard and {list(other)} in another")
        count = sum(stop - start for start, stop in (shard.range for _, shard in stored))
        if count < math.prod(shape):
            raise CheckpointError(
                f"{index}: {key} is incomplete: {count:,} of the {math.prod(shape):,} elements of {list(shape)}"
            )
    return where
