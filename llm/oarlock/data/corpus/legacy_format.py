"""prefix_ids.npy and prefix_idx.npz, PaddleNLP's older form of a corpus: read without pickle, sizes checked first."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from oarlock.errors import DataError
from oarlock.formats.files import open_regular


def read_ids(prefix: str | Path) -> np.ndarray:
    """The token ids, mapped, [tokens].

    Raises:
        DataError: when the file is not a flat array of whole numbers.
    """
    path = Path(f"{prefix}_ids.npy")
    open_regular(path, error=DataError).close()
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's reader of headers raises what Python's parser does
        raise DataError(f"{path}: not a readable corpus: {error}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"{path}: not a readable corpus: not a flat array of whole numbers")
    if not len(ids):
        raise DataError(f"{path}: holds no tokens")
    return ids


def read_index(prefix: str | Path, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each sequence, int32 [sequences], and where documents begin, int64 [documents + 1].

    The oldest files have no bounds of documents (an empty array): a length is a document's there.

    Args:
        num_tokens: of the ids, which bound how much an index may hold.

    Raises:
        DataError: for a damaged index, or one that does not fit the ids.
    """
    path = Path(f"{prefix}_idx.npz")
    most = 16 * num_tokens + (1 << 16)  # bytes: a sequence has a token at least, and a length 8 bytes at most
    try:
        with open_regular(path, error=DataError) as file, zipfile.ZipFile(file) as archive:
            sizes = _array(archive, "lens", most)
            bounds = _array(archive, "docs", most) if "docs.npy" in archive.namelist() else np.zeros(0, np.int64)
    except DataError:
        raise
    except Exception as error:  # of zipfile, zlib and numpy
        raise DataError(f"{path}: not a readable corpus: {error}") from error
    if len(sizes) and (int(sizes.min()) < 0 or int(sizes.max()) > num_tokens):
        raise DataError(f"{path}: a sequence has {int(sizes.min()):,} to {int(sizes.max()):,} tokens; it is damaged")
    if (total := int(sizes.sum(dtype=np.int64))) != num_tokens:
        raise DataError(f"{prefix}_ids.npy: {num_tokens:,} tokens, its index expects {total:,}")
    return sizes.astype(np.int32), bounds.astype(np.int64)


def _array(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """A flat array of whole numbers, of which no more is allocated than the file has."""
    size = archive.getinfo(f"{name}.npy").file_size
    if size > most:
        raise ValueError(f"{name} has {size:,} bytes, too many for its tokens")
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        if len(shape) != 1 or dtype.kind not in "iu" or shape[0] * dtype.itemsize != size - member.tell():
            raise ValueError(f"{name} is not a flat array of whole numbers")
        content = member.read()
    return np.frombuffer(content, dtype, count=shape[0])
