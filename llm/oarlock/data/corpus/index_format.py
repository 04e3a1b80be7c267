"""The .bin/.idx files that PaddleNLP's CausalDataset (and Megatron's) reads: written in flat memory, read checked.

Layout of .idx (paddlenlp.data.indexed_dataset.MMapIndexedDataset): magic, version, dtype code, number of sequences,
number of document bounds, then int32 sizes, int64 byte offsets, int64 document bounds. Our writer exists because
MMapIndexedDatasetBuilder keeps every size in Python lists (tens of bytes a document) and writes in place, so that an
interrupted run leaves files that look whole.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from oarlock.errors import DataError
from oarlock.formats.files import open_regular
from oarlock.formats.sealed import seal_text

_MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX"  # Megatron's index that is not memory-mapped
# Megatron's codes, as PaddleNLP reads them. 6 and 7 are floating point, which no tokens are.
_DTYPES = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2", 9: "u4", 10: "u8"}.items()
}
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20  # sizes converted at a time
MAX_SEQUENCE_TOKENS = (1 << 31) - 1  # the sizes of an .idx are int32
FORMAT = 3  # of prefix.json (see oarlock.data.corpus.notes)


def choose_token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (PaddleNLP's rule: fewer than 65,500 tokens), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class CorpusWriter:
    """Write `prefix.bin`, `prefix.idx` and `prefix.json`; they appear together, complete, when `finish` returns.

    A document is one sequence, however many parts it comes in.

    Until then everything lies in `*.partial` files, which are removed when the writer is closed without `finish`.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.dtype = choose_token_dtype(vocab_size)
        self.num_documents = self.num_tokens = 0
        self.largest_id = -1
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {}
        self._open_tokens = 0  # of the document that is not at its end yet
        for kind in ("bin", "sizes"):
            self._files[kind] = open(self._partial(kind), "wb")  # noqa: SIM115 - closed by close()

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, ids: np.ndarray, sizes: np.ndarray, ends: np.ndarray) -> None:
        """Append documents, or parts of them.

        Args:
            ids: token ids of all parts, one after the other, [total].
            sizes: tokens of each, all above 0, [parts].
            ends: whether a document ends after each, bool [parts].

        Raises:
            DataError: for a document with more tokens than an .idx can say.
        """
        if not len(sizes):
            return
        self.largest_id = max(self.largest_id, int(ids.max()))
        before = np.cumsum(sizes, dtype=np.int64)
        at_ends = before[np.flatnonzero(ends)] + self._open_tokens
        documents = np.diff(at_ends, prepend=0)
        self._open_tokens += int(before[-1]) - (int(at_ends[-1]) if len(at_ends) else 0)
        if max(documents.max(initial=0), self._open_tokens) > MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"a document of more than {MAX_SEQUENCE_TOKENS:,} tokens can't be one sequence of a corpus (an .idx "
                "stores sizes in 32 bits); split the file, or make each line a document (--txt-document line)"
            )
        self._files["bin"].write(ids.astype(self.dtype).tobytes())
        self._files["sizes"].write(documents.astype(np.int32).tobytes())
        self.num_tokens += len(ids)
        self.num_documents += len(documents)

    def finish(self, about: dict[str, Any]) -> None:
        """Write the index and put all three files in place (the index last, so that it vouches for the data)."""
        assert not self._open_tokens, "the last document was not ended"
        if not self.num_tokens:
            raise DataError(f"{self.prefix}: the input holds no text, nothing was written")
        for file in self._files.values():
            _flush_to_disk(file)
        with open(self._partial("idx"), "wb") as index:
            code = next(code for code, dtype in _DTYPES.items() if dtype == self.dtype)
            index.write(_HEADER.pack(_MAGIC, 1, code, self.num_documents, self.num_documents + 1))
            with open(self._partial("sizes"), "rb") as sizes:
                while block := sizes.read(4 * _CHUNK):
                    index.write(block)
                sizes.seek(0)
                offset = 0
                while block := sizes.read(4 * _CHUNK):
                    ends = offset + np.cumsum(np.frombuffer(block, np.int32), dtype=np.int64) * self.dtype.itemsize
                    index.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
                    offset = int(ends[-1])
            for first in range(0, self.num_documents + 1, _CHUNK):
                index.write(np.arange(first, min(first + _CHUNK, self.num_documents + 1), dtype=np.int64).tobytes())
            _flush_to_disk(index)
        summary = {
            "format": FORMAT,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "largest_id": self.largest_id,
            **about,
        }
        self._partial("json").write_text(seal_text(summary), encoding="utf-8")
        # An index of an older corpus must never be combined with the new data.
        for kind in ("idx", "json"):
            self._final(kind).unlink(missing_ok=True)
        for kind in ("bin", "json", "idx"):
            os.replace(self._partial(kind), self._final(kind))
        self.close()

    def close(self) -> None:
        """Close and remove what is not in place yet."""
        for file in self._files.values():
            file.close()
        for kind in ("bin", "sizes", "idx", "json"):
            self._partial(kind).unlink(missing_ok=True)

    def _partial(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}.partial")

    def _final(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}")


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def is_corpus_present(prefix: str | Path) -> bool:
    """Whether a corpus (.bin/.idx, or the legacy _ids.npy/_idx.npz) lies under this prefix."""
    return all(Path(f"{prefix}{end}").is_file() for end in (".bin", ".idx")) or is_legacy(prefix)


def is_legacy(prefix: str | Path) -> bool:
    """Whether the corpus is in PaddleNLP's older form, prefix_ids.npy and prefix_idx.npz."""
    return all(Path(f"{prefix}{end}").is_file() for end in ("_ids.npy", "_idx.npz"))


def list_existing_files(prefix: str | Path) -> list[Path]:
    """Files of a corpus under this prefix, whole or not."""
    ends = (".bin", ".idx", ".json", "_ids.npy", "_idx.npz")
    return [path for end in ends if (path := Path(f"{prefix}{end}")).exists()]


def check_corpus(prefix: str | Path) -> None:
    """Refuse an index that does not fit its data (a half copied or overwritten file).

    Raises:
        DataError: saying which file is wrong and how many bytes were expected.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with open_regular(index, error=DataError) as file:
        header = file.read(_HEADER.size)
    open_regular(data, error=DataError).close()
    if header.startswith(_OLD_MAGIC):
        raise DataError(f"{index}: Megatron's old index (TNTIDX), which is not read; write it with --dataset-impl mmap")
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{index}: not an index file (expected one written by `oarlock data pretrain`, or Megatron's)")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{index}: version {version} with dtype code {code}; known are version 1 and whole numbers")
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if sequences and index.stat().st_size == expected + sequences:
        raise DataError(f"{index}: a corpus of text and other modes (a byte more a sequence), which is not read")
    if index.stat().st_size != expected:
        raise DataError(f"{index}: {index.stat().st_size:,} bytes, expected {expected:,}; the file is damaged")
    sizes = np.memmap(index, np.int32, "r", offset=_HEADER.size, shape=(sequences,)) if sequences else np.zeros(0)
    expected = 0  # bytes of the sequences, which lie one behind the other in the data
    for first in range(0, len(sizes), _CHUNK):
        lengths = np.asarray(sizes[first : first + _CHUNK], np.int64)
        place = _HEADER.size + 4 * len(sizes) + 8 * first
        offsets = np.memmap(index, np.int64, "r", offset=place, shape=(len(lengths),))
        ends = expected + np.cumsum(lengths) * _DTYPES[code].itemsize
        if int(lengths.min()) < 0 or (offsets != np.concatenate(([expected], ends[:-1]))).any():
            raise DataError(f"{index}: its sequences do not follow one another; the file is damaged")
        expected = int(ends[-1])
    if data.stat().st_size != expected:
        raise DataError(
            f"{data}: {data.stat().st_size:,} bytes, its index expects {expected:,}; build the corpus again"
        )
    if not expected:
        raise DataError(f"{data}: holds no tokens; build the corpus again")
    mask = Path(f"{prefix}.lsm")
    if mask.exists() and mask.stat().st_size != expected // _DTYPES[code].itemsize:
        raise DataError(f"{mask}: {mask.stat().st_size:,} bytes, one a token of {data} would be as many as its tokens")


def token_ids(prefix: str | Path) -> np.ndarray:
    """All ids of a corpus that check_corpus() took, as they are mapped from its file."""
    if is_legacy(prefix):
        return np.asarray(np.load(f"{prefix}_ids.npy", mmap_mode="r", allow_pickle=False))
    with open_regular(f"{prefix}.idx", error=DataError) as file:
        code = _HEADER.unpack(file.read(_HEADER.size))[2]
    data = Path(f"{prefix}.bin")
    return np.memmap(data, _DTYPES[code], "r") if data.stat().st_size else np.zeros(0, _DTYPES[code])
