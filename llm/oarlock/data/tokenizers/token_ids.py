"""Checking stored token ids against the vocabulary size."""

from __future__ import annotations

import numpy as np

from oarlock.errors import DataError

_CHECKED_BYTES = 1 << 28  # of a file when it is opened; for larger files, blocks spread over the file
_BLOCK = 1 << 20


def check_range(ids: np.ndarray, vocab_size: int, name: str) -> None:
    """Refuse ids outside the vocabulary before a model is built.

    Files of up to 256 MB are checked completely. Of larger ones, evenly spaced blocks of that total size are checked
    here, and the rest when it is read (see oarlock.data.examples.collate).

    Args:
        ids: of a memory-mapped file, [tokens].
        name: of the file.

    Raises:
        DataError: with the id and its position.
    """
    block = _BLOCK // ids.itemsize
    starts = np.arange(0, len(ids), block)
    if ids.nbytes > _CHECKED_BYTES:
        starts = starts[np.unique(np.linspace(0, len(starts) - 1, _CHECKED_BYTES // _BLOCK).astype(np.int64))]
    for start in starts:
        part = ids[start : start + block]
        if int(part.max()) < vocab_size and (part.dtype.kind == "u" or int(part.min()) >= 0):
            continue
        at = int(np.flatnonzero((part >= vocab_size) | (part < 0))[0])
        raise DataError(
            f"{name}: token {int(start) + at:,} is id {int(part[at]):,}, but the model's vocabulary has "
            f"{vocab_size:,} rows. The file was made with another tokenizer or is damaged; create it again"
        )
