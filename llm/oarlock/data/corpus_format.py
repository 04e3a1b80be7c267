"""The .bin/.idx files that PaddleNLP's CausalDataset (and Megatron's) reads: written in flat memory, read checked.

Layout of .idx (paddlenlp.data.indexed_dataset.MMapIndexedDataset): magic, version, dtype code, number of sequences,
number of document bounds, then int32 sizes, int64 byte offsets, int64 document bounds. Our writer exists because
MMapIndexedDatasetBuilder keeps every size in Python lists (tens of bytes a document) and writes in place, so that an
interrupted run leaves files that look whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from oarlock.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES: dict[np.dtype, int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20  # sizes converted at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (PaddleNLP's rule: fewer than 65,500 tokens), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class CorpusWriter:
    """Write `prefix.bin`, `prefix.idx` and `prefix.json`; they appear together, complete, when `finish` returns.

    Until then everything lies in `*.partial` files, which are removed when the writer is closed without `finish`.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self.num_documents = self.num_tokens = 0
        self.largest_id = -1
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {}
        self._sequences = 0
        for kind in ("bin", "sizes", "bounds"):
            self._files[kind] = open(self._partial(kind), "wb")  # noqa: SIM115 - closed by close()
        self._files["bounds"].write(struct.pack("<q", 0))

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, ids: np.ndarray, sizes: np.ndarray, ends: np.ndarray) -> None:
        """Append sequences.

        Args:
            ids: token ids of all of them, one after the other, [total].
            sizes: tokens of each, all above 0, [sequences].
            ends: whether a document ends after each, bool [sequences].
        """
        if not len(sizes):
            return
        self.largest_id = max(self.largest_id, int(ids.max()))
        self._files["bin"].write(ids.astype(self.dtype).tobytes())
        self._files["sizes"].write(sizes.astype(np.int32).tobytes())
        bounds = self._sequences + 1 + np.flatnonzero(ends)
        self._files["bounds"].write(bounds.astype(np.int64).tobytes())
        self._sequences += len(sizes)
        self.num_tokens += len(ids)
        self.num_documents += len(bounds)

    def finish(self, about: dict[str, Any]) -> None:
        """Write the index and put all three files in place (the index last, so that it vouches for the data)."""
        if not self.num_tokens:
            raise DataError(f"{self.prefix}: the input holds no text, nothing was written")
        for file in self._files.values():
            _flush_to_disk(file)
        with open(self._partial("idx"), "wb") as index:
            self._write_index(index)
            _flush_to_disk(index)
        summary = {"documents": self.num_documents, "tokens": self.num_tokens, "largest_id": self.largest_id, **about}
        self._partial("json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        # An index of an older corpus must never stand beside the new data.
        for kind in ("idx", "json"):
            self._final(kind).unlink(missing_ok=True)
        for kind in ("bin", "json", "idx"):
            os.replace(self._partial(kind), self._final(kind))
        self.close()

    def close(self) -> None:
        """Close and remove what is not in place yet."""
        for file in self._files.values():
            file.close()
        for kind in ("bin", "sizes", "bounds", "idx", "json"):
            self._partial(kind).unlink(missing_ok=True)

    def _write_index(self, index: BinaryIO) -> None:
        index.write(_HEADER.pack(_MAGIC, 1, _DTYPE_CODES[self.dtype], self._sequences, self.num_documents + 1))
        with open(self._partial("sizes"), "rb") as sizes:
            while block := sizes.read(4 * _CHUNK):
                index.write(block)
            sizes.seek(0)
            offset = 0
            while block := sizes.read(4 * _CHUNK):
                ends = offset + np.cumsum(np.frombuffer(block, np.int32), dtype=np.int64) * self.dtype.itemsize
                index.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
                offset = int(ends[-1])
        with open(self._partial("bounds"), "rb") as bounds:
            while block := bounds.read(8 * _CHUNK):
                index.write(block)

    def _partial(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}.partial")

    def _final(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}")


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def corpus_exists(prefix: str | Path) -> bool:
    """Whether a corpus (.bin/.idx, or the legacy _ids.npy/_idx.npz) lies under this prefix."""
    return all(Path(f"{prefix}{end}").is_file() for end in (".bin", ".idx")) or is_legacy(prefix)


def is_legacy(prefix: str | Path) -> bool:
    """Whether the corpus is in PaddleNLP's older form, prefix_ids.npy and prefix_idx.npz."""
    return all(Path(f"{prefix}{end}").is_file() for end in ("_ids.npy", "_idx.npz"))


def check_corpus(prefix: str | Path) -> None:
    """Refuse an index that does not fit its data (a half copied or overwritten file).

    Raises:
        DataError: saying which file is wrong and how many bytes were expected.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{index}: not an index file (expected one written by `oarlock data pretrain`, or Megatron's)")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    itemsize = next((dtype.itemsize for dtype, known in _DTYPE_CODES.items() if known == code), None)
    if version != 1 or itemsize is None:
        raise DataError(f"{index}: version {version} with dtype code {code}; known are version 1, int32 and uint16")
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if index.stat().st_size != expected:
        raise DataError(f"{index}: {index.stat().st_size:,} bytes, expected {expected:,}; the file is damaged")
    sizes = np.memmap(index, np.int32, "r", offset=_HEADER.size, shape=(sequences,)) if sequences else np.zeros(0)
    expected = int(sizes.sum(dtype=np.int64)) * itemsize
    if data.stat().st_size != expected:
        raise DataError(
            f"{data}: {data.stat().st_size:,} bytes, its index expects {expected:,}; build the corpus again"
        )


def corpus_summary(prefix: str | Path) -> dict[str, Any]:
    """What `oarlock data pretrain` noted beside a corpus (largest_id, tokenizer, ...); empty for others."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    return {}
