"""The index of a folder's weight files (model.safetensors.index.json and the like): the file of each tensor."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from oarlock.errors import ModelError
from oarlock.formats.json_file import INDEX_BYTES, read_json
from oarlock.formats.names import find_name_problem

_MOST_FILES = 4096  # the largest published models have a few hundred


class _Index(TypedDict):
    weight_map: dict[str, str]


def read_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Read an index.

    Args:
        suffix: that all files in it must have.

    Returns:
        Tensor name -> name of a file next to the index.

    Raises:
        ModelError: for an index of another form, and one that names anything but weight files of its own folder.
    """
    weight_map = read_json(path, _Index, limit=INDEX_BYTES)["weight_map"]
    files = sorted(set(weight_map.values()))
    if not files:
        raise ModelError(f"{path}: weight_map is empty: it has to give each tensor the name of a file next to it")
    for file in files:
        problem = find_name_problem(file) or ("" if file.endswith(suffix) else f"it does not end in {suffix}")
        if problem:
            raise ModelError(
                f"{path}: weight_map has to give each tensor the name of a file next to it; {file[:200]!r} is none: "
                f"{problem}"
            )
    if len(files) > _MOST_FILES:
        raise ModelError(f"{path}: weight_map names {len(files):,} files; a model has {_MOST_FILES:,} at most")
    return weight_map
