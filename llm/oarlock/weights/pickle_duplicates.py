"""Compare pickled weights with the safetensors in the same folder, without unpickling anything.

torch.save writes a zip archive with every tensor's bytes in a file of its own, whose size and CRC-32 are in the
archive's directory. Other pickles only reveal their size.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oarlock.errors import ModelError
from oarlock.weights.safetensors_file import SafetensorsFile

_READ_BYTES = 256 << 20  # of tensors whose checksums are compared, spread over all of them
_BUFFER_BYTES = 1 << 16  # a pickle may hold additional tensors of up to this size
_SLACK = 0.02  # share of a pickle that is not tensors


def find_differing_pickle(used: Sequence[Path], pickles: Sequence[Path]) -> str | None:
    """Find a pickle that holds other weights. None if they are the same, as far as can be seen.

    Args:
        used: the safetensors files.
        pickles: all files of the pickled set, of one or several kinds.
    """
    for suffix in (".bin", ".pdparams"):
        files = [path for path in pickles if path.suffix == suffix]
        if files and not _are_same(used, files):
            return files[0].name
    return None


def _are_same(used: Sequence[Path], files: Sequence[Path]) -> bool:
    total = sum(size for path in used for _, size in _list_sizes(path))
    if not all(zipfile.is_zipfile(path) for path in files):
        size = sum(path.stat().st_size for path in files)
        return abs(size - total) <= max(1 << 20, total * _SLACK)
    stored: dict[int, set[int]] = {}  # bytes -> checksums
    for path in files:
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [about for about in archive.infolist() if "/data/" in about.filename]
        except (OSError, zipfile.BadZipFile) as error:
            raise ModelError(f"{path}: not a readable archive of weights: {error}") from error
        for about in entries:
            stored.setdefault(about.file_size, set()).add(about.CRC)
    own: dict[int, set[int]] = {}
    # All tensors of a small model are read, every n-th of a large one.
    every = max(1, -(-total // _READ_BYTES))
    checked = set([(path, name) for path in used for name, _ in sorted(_list_sizes(path))][::every])
    for path in used:
        for name, size in _list_sizes(path):
            if size not in stored:
                return False
            if (path, name) in checked and stored[size] != {0}:
                crc = _compute_crc(path, name)
                own.setdefault(size, set()).add(crc)
                if crc not in stored[size]:
                    return False
    known = {size for path in used for _, size in _list_sizes(path)}
    return all(size in known or size <= _BUFFER_BYTES for size in stored)


def _list_sizes(path: Path) -> list[tuple[str, int]]:
    try:
        with SafetensorsFile(path) as file:
            return [(name, about.num_bytes) for name, about in file.tensors.items()]
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error


def _compute_crc(path: Path, name: str) -> int:
    with SafetensorsFile(path) as file:
        about = file.tensors[name]
        values = np.empty(about.shape, about.dtype)
        file.read(name, 0, values)
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
