"""A check of stored token ids against the size of the vocabulary."""

from __future__ import annotations

import numpy as np

from oarlock.errors import DataError

_LOOKED_AT = 1 << 28  # bytes of a file that are looked at when it is opened; of larger ones, blocks from all over it
_BLOCK = 1 << 20


def check_range(ids: np.ndarray, vocab_size: int, name: str) -> None:
    """Refuse ids without a row in the embedding, before a model is built.

    All of a file of up to 256 MB, as many bytes in evenly spread blocks of a larger one: what is left is looked at when
    it is read (see oarlock.data.examples.collate).

    Args:
        ids: of a mapped file, [tokens].
        name: of the file.

    Raises:
        DataError: naming the id and its place.
    """
    block = _BLOCK // ids.itemsize
    starts = np.arange(0, len(ids), block)
    if ids.nbytes > _LOOKED_AT:
        starts = starts[np.unique(np.linspace(0, len(starts) - 1, _LOOKED_AT // _BLOCK).astype(np.int64))]
    for start in starts:
        part = ids[start : start + block]
        if int(part.max()) < vocab_size and (part.dtype.kind == "u" or int(part.min()) >= 0):
            continue
        at = int(np.flatnonzero((part >= vocab_size) | (part < 0))[0])
        raise DataError(
            f"{name}: token {int(start) + at:,} is id {int(part[at]):,}, but the model's vocabulary has "
            f"{vocab_size:,} rows: made with another tokenizer, or damaged; make it again"
        )
