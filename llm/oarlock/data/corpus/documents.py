"""The documents of an open corpus, joined from the sequences of its index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from oarlock.data.corpus.notes import WHOLE_DOCUMENTS, read_corpus_summary
from oarlock.errors import DataError


class Documents:
    """The documents of a corpus: their sizes, and their token ids from any offset.

    Corpora of other programs and of earlier versions may store a document as several consecutive sequences. They are
    joined here, so that they are neither split nor shuffled. Without document bounds, each sequence is a document
    (Megatron's rule). Empty documents are skipped.

    Args:
        reader: PaddleNLP's, with `sizes`, `doc_idx` and `get`.
        prefix: of the corpus, for messages.

    Attributes:
        sizes: tokens of each document, [documents].
        joined: whether any document was joined.

    Raises:
        DataError: for bounds that don't fit the sequences.
    """

    def __init__(self, reader: Any, prefix: str) -> None:
        self._reader = reader
        sequence_sizes, bounds = np.asarray(reader.sizes), np.asarray(reader.doc_idx, np.int64)
        num_sequences = len(sequence_sizes)
        if len(bounds) <= 1 and num_sequences:
            bounds = np.arange(num_sequences + 1)
        if len(bounds) and (bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any()):
            raise DataError(
                f"{prefix}: its documents end at sequence {int(bounds[-1]):,} of {num_sequences:,}; the "
                "index is damaged, build the corpus again"
            )
        self.joined = False
        self._first: np.ndarray | None = None  # first sequence of each document; None: document i is sequence i
        self.sizes = sequence_sizes
        if len(bounds) == num_sequences + 1 and (np.diff(bounds) == 1).all() and sequence_sizes.all():
            return  # the sizes stay in the mapped file
        ends = np.concatenate(([0], np.cumsum(sequence_sizes, dtype=np.int64)))[bounds]
        sizes = np.diff(ends)
        self._first = bounds[:-1][sizes > 0]
        self.sizes = sizes[sizes > 0]
        self.joined = len(self.sizes) < np.count_nonzero(sequence_sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return `length` token ids of a document from `offset` on (by default to its end), and their loss mask."""
        length = int(self.sizes[index]) - int(offset) if length is None else int(length)
        # PaddleNLP's readers continue into the next sequence, which is the next one of the document.
        first = int(index) if self._first is None else int(self._first[index])
        return self._reader.get(first, offset=int(offset), length=length)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)[0]


def remarks(prefix: str, documents: Documents, num_sequences: int) -> list[str]:
    """List remarks on a corpus that this version would have written differently, with what to do."""
    summary = read_corpus_summary(prefix)
    again = "rebuild it with `oarlock data pretrain --overwrite` to avoid this"
    if "tokenizer_fingerprint" in summary and summary.get("format", 1) < WHOLE_DOCUMENTS:
        joined = f"{len(documents):,} documents were joined from {num_sequences:,} parts; "
        return [
            f"{prefix}: built by an earlier version, which may have split long .txt documents at positions that change "
            f"token ids; {joined if documents.joined else ''}{again}"
        ]
    if documents.joined:
        return [f"{prefix}: {len(documents):,} documents in {num_sequences:,} sequences, joined for training"]
    return []


def check_summary(prefix: str, documents: Documents) -> None:
    """Refuse a .json of another build of the corpus.

    Raises:
        DataError: with both numbers.
    """
    summary = read_corpus_summary(prefix)
    if summary.get("format", 1) < WHOLE_DOCUMENTS:
        return
    for name, there in (("documents", len(documents)), ("tokens", int(documents.sizes.sum(dtype=np.int64)))):
        if summary.get(name) != there:
            raise DataError(
                f"{prefix}: {there:,} {name}, but {Path(prefix).name}.json says {summary.get(name)}; these files are "
                "from different builds. Rebuild the corpus"
            )


def ends_with(documents: Documents, token: int, asked: int = 1000) -> float:
    """Return the fraction of documents that end with a token, from at most `asked` documents, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(documents) - 1, min(asked, len(documents))).astype(np.int64))
    last = [int(documents.get(int(i), offset=int(documents.sizes[i]) - 1)[0][0]) for i in chosen]
    return float(np.mean(np.asarray(last) == token)) if last else 1.0
