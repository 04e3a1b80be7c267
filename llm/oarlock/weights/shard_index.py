"""tensors.json: which piece of which whole tensor every entry of a checkpoint's files is."""

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
from oarlock.weights.tensor_slice import Block

INDEX = "tensors.json"
WEIGHTS = "model"  # the kind of tensor that is a weight; other kinds are optimizer states ("moment1", "master", ...)
MASTER = "master"  # float32 copies of half-precision weights (the optimizer's _master_weights)
# 512 ranks with four pieces each of 700 tensors have 150 MB, and 4 million objects and lists.
_INDEX_BYTES, _INDEX_CONTAINERS = 1 << 29, 10_000_000
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_Whole = Annotated[int, Ge(0)]


class _Entry(TypedDict):
    """A piece in tensors.json."""

    shape: list[_Whole]
    axis: NotRequired[_Whole]
    runs: NotRequired[list[tuple[_Whole, _Whole]]]
    flat: NotRequired[tuple[_Whole, _Whole]]


@dataclass(frozen=True)
class Piece:
    """A stored part of a whole tensor.

    Attributes:
        kind: WEIGHTS, or the name of an optimizer state.
        name: of the parameter, as on one card.
        block: the tensor-parallel part it belongs to.
        flat: (start, stop) in the flattened block, where stage 3 slices it; None for all of it.
    """

    kind: str
    name: str
    block: Block
    flat: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.kind}/{self.name}"

    @property
    def range(self) -> tuple[int, int]:
        """(start, stop) in the flattened block."""
        return self.flat or (0, math.prod(self.block.part_shape))

    def to_json(self) -> dict[str, Any]:
        """For tensors.json."""
        content: dict[str, Any] = {"shape": list(self.block.shape)}
        if self.block.axis is not None:
            content |= {"axis": self.block.axis, "runs": [list(run) for run in self.block.runs]}
        if self.flat is not None:
            content["flat"] = list(self.flat)
        return content

    @classmethod
    def from_json(cls, key: str, content: Mapping[str, Any]) -> Piece:
        """Inverse of to_json."""
        kind, _, name = key.partition("/")
        runs = tuple((int(start), int(length)) for start, length in content.get("runs", ()))
        flat = content.get("flat")
        block = Block(tuple(content["shape"]), content.get("axis"), runs)
        return cls(kind, name, block, (int(flat[0]), int(flat[1])) if flat else None)

    def problem(self) -> str | None:
        """Why this can't be a piece of any tensor; None for one that can."""
        block = self.block
        if not self.kind or not self.name:
            return "has no kind and name"
        if (block.axis is None) != (not block.runs) or (block.axis is not None and block.axis >= len(block.shape)):
            return f"can't be cut along axis {block.axis} of {list(block.shape)}"
        if block.axis is not None:
            ordered = sorted(block.runs)
            ends = [start + length for start, length in ordered]
            starts = [*(start for start, _ in ordered[1:]), block.shape[block.axis]]
            if any(end > following for end, following in zip(ends, starts, strict=True)):
                return f"has runs that overlap, or leave the {block.shape[block.axis]:,} of axis {block.axis}"
        start, stop = self.range
        if not 0 <= start <= stop <= math.prod(block.part_shape):
            return f"can't be elements {start:,} to {stop:,} of {math.prod(block.part_shape):,}"
        return None


def part_name(rank: int) -> str:
    """The file of a rank."""
    return f"rank-{rank:05d}.safetensors"


def write_index(folder: Path, parts: Mapping[str, list[Piece]]) -> None:
    """tensors.json: file -> key -> what it is."""
    content = {file: {piece.key: piece.to_json() for piece in pieces} for file, pieces in sorted(parts.items())}
    (folder / INDEX).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_index(folder: Path) -> dict[str, list[tuple[Path, Piece]]]:
    """What write_index wrote: key -> the pieces of that tensor and their files.

    Raises:
        CheckpointError: when it is missing, or says what no tensors can be.
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
    where: dict[str, list[tuple[Path, Piece]]] = {}
    for file, entries in content.items():
        if not _FILE.fullmatch(file):
            raise CheckpointError(f"{index}: {file!r} is not the name of a safetensors file in this folder")
        for key, entry in entries.items():
            piece = Piece.from_json(key, entry)
            if problem := piece.problem():
                raise CheckpointError(f"{index}: {key} in {file} {problem}")
            where.setdefault(key, []).append((folder / file, piece))
    for key, stored in where.items():
        _check_together(index, key, [piece for _, piece in stored])
    return where


def _check_together(index: Path, key: str, pieces: list[Piece]) -> None:
    """Refuse pieces that are of tensors of several shapes, or are fewer elements than the tensor has."""
    shape = pieces[0].block.shape
    other = next((piece.block.shape for piece in pieces if piece.block.shape != shape), None)
    if other is not None:
        raise CheckpointError(f"{index}: {key} is {list(shape)} in one piece and {list(other)} in another")
    stored = sum(stop - start for start, stop in (piece.range for piece in pieces))
    if stored < math.prod(shape):
        raise CheckpointError(
            f"{index}: {key} is not all there: {stored:,} of the {math.prod(shape):,} elements of {list(shape)}"
        )
