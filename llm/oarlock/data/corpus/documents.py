"""The documents of an opened corpus, each in one piece, whatever sequences its index holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from oarlock.data.corpus.notes import WHOLE_DOCUMENTS, corpus_summary
from oarlock.errors import DataError


class Documents:
    """A corpus by documents: their sizes, and ids from any place of one.

    Other programs' corpora, and those of earlier versions, may hold a document in several sequences, one after the
    other in the .bin; they are put together here, so that no reader cuts or shuffles them apart. An index without
    document bounds has a document a sequence, which is Megatron's rule. Documents without a token are left out.

    Args:
        reader: of PaddleNLP, with `sizes`, `doc_idx` and `get`.
        prefix: for messages.

    Attributes:
        sizes: tokens of each document, [documents].
        joined: whether documents were put together.

    Raises:
        DataError: for bounds that do not fit the sequences.
    """

    def __init__(self, reader: Any, prefix: str) -> None:
        self._reader = reader
        sequence_sizes, bounds = np.asarray(reader.sizes), np.asarray(reader.doc_idx, np.int64)
        num_sequences = len(sequence_sizes)
        if len(bounds) <= 1 and num_sequences:
            bounds = np.arange(num_sequences + 1)
        if len(bounds) and (bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any()):
            raise DataError(
                f"{prefix}: its documents are said to end at sequence {int(bounds[-1]):,} of {num_sequences:,}; the "
                "index is damaged, build the corpus again"
            )
        self.joined = False
        self._first: np.ndarray | None = None  # sequence that each document begins with; None: those of its own number
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
        """`length` ids of a document from `offset` on (to its end where no length is given), and their loss mask."""
        length = int(self.sizes[index]) - int(offset) if length is None else int(length)
        # PaddleNLP's readers do not stop at the end of a sequence, and the next one of a document lies behind it.
        first = int(index) if self._first is None else int(self._first[index])
        return self._reader.get(first, offset=int(offset), length=length)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)[0]


def remarks(prefix: str, documents: Documents, num_sequences: int) -> list[str]:
    """What to know of a corpus that this version would have written otherwise, with the way out."""
    summary = corpus_summary(prefix)
    again = "build it again with `oarlock data pretrain --overwrite` to be rid of this"
    if "tokenizer_fingerprint" in summary and summary.get("format", 1) < WHOLE_DOCUMENTS:
        joined = f"{len(documents):,} documents were joined from {num_sequences:,} parts; "
        return [
            f"{prefix}: built by an earlier version, whose long .txt documents may have other ids at places that it "
            f"cut; {joined if documents.joined else ''}{again}"
        ]
    if documents.joined:
        return [f"{prefix}: {len(documents):,} documents in {num_sequences:,} sequences, joined for training"]
    return []


def check_summary(prefix: str, documents: Documents) -> None:
    """Refuse a .json that is not of this corpus (files of two builds put together).

    Raises:
        DataError: with both numbers.
    """
    summary = corpus_summary(prefix)
    if summary.get("format", 1) < WHOLE_DOCUMENTS:
        return
    for name, there in (("documents", len(documents)), ("tokens", int(documents.sizes.sum(dtype=np.int64)))):
        if summary.get(name) != there:
            raise DataError(
                f"{prefix}: {there:,} {name}, but {Path(prefix).name}.json says {summary.get(name)}; these files are "
                "of different builds, build the corpus again"
            )


def ends_with(documents: Documents, token: int, asked: int = 1000) -> float:
    """Share of documents that end with a token, of at most `asked` of them, evenly spread."""
    chosen = np.unique(np.linspace(0, len(documents) - 1, min(asked, len(documents))).astype(np.int64))
    last = [int(documents.get(int(i), offset=int(documents.sizes[i]) - 1)[0][0]) for i in chosen]
    return float(np.mean(np.asarray(last) == token)) if last else 1.0
