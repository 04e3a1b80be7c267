"""Read text files of any size in bounded memory: txt, jsonl and parquet, plain or compressed (gz, zst).

A file is cut into batches of about a megabyte that carry their first line number, so that a bad line can be named as
file:line wherever it is parsed.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from oarlock.errors import DataError

BATCH_BYTES = 1 << 20
# A document that is a whole file is tokenised in pieces cut at line ends: tokenizers without a pre-tokenizer take
# more than linear time on one long string.
PIECE_BYTES = 1 << 16
# A text without line ends is cut between characters after this much, so that memory stays bounded.
LONGEST_TEXT_LINE = 1 << 24

_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_FORMATS = {".txt": "txt", ".md": "txt", ".text": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """One input file. `format` is txt, jsonl or parquet; `compression` is "", gz or zst."""

    path: Path
    format: str
    compression: str
    size: int


@dataclass(frozen=True)
class Batch:
    """A piece of a source, small enough to send to a worker.

    Attributes:
        first_line: number of the first line of `data` (txt, jsonl), or of the first row (parquet), from 1.
        data: raw bytes of whole lines; for parquet empty (the worker reads `row_group` itself).
        consumed: bytes of the file read for this batch (compressed ones where the file is compressed).
        ends_file: nothing of the source follows.
    """

    source: Source
    first_line: int
    data: bytes
    consumed: int
    ends_file: bool
    row_group: int = -1


@dataclass(frozen=True)
class Piece:
    """Text to tokenise; `ends_document` says that an end-of-document token follows it."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class BadLine:
    """A line or row that could not be used."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def find_sources(paths: Sequence[str]) -> list[Source]:
    """The files named, and those of known kinds inside folders, in a stable order.

    Raises:
        DataError: for a missing path, an unknown kind, or a folder with nothing to read.
    """
    sources: list[Source] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found = [s for p in sorted(path.rglob("*")) if p.is_file() and (s := known_source(p)) is not None]
            if not found:
                raise DataError(f"{path}: no {', '.join(_FORMATS)} files (or .gz, .zst of them) in this folder")
            sources += found
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        else:
            source = known_source(path)
            if source is None:
                raise DataError(f"{path}: unknown kind of file; known are {', '.join(_FORMATS)}, also as .gz or .zst")
            sources.append(source)
    return sources


def known_source(path: Path) -> Source | None:
    """The source a file is by its name, None for an unknown kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    if compression:
        suffixes.pop()
    kind = _FORMATS.get(suffixes[-1]) if suffixes else None
    if kind is None or (kind == "parquet" and compression):
        return None
    return Source(path, kind, compression, path.stat().st_size)


def read_batches(source: Source) -> Iterator[Batch]:
    """Cut one source into batches.

    Raises:
        DataError: for a file that can't be opened or decompressed.
    """
    with naming(source):
        yield from _parquet_batches(source) if source.format == "parquet" else _line_batches(source)


@contextlib.contextmanager
def naming(source: Source) -> Iterator[None]:
    """Turn what goes wrong in reading a source into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each decompressor has its own error class (gzip's is an OSError without errno)
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{source.path}: {error.strerror}") from error
        if not (source.compression or source.format == "parquet"):
            raise
        raise DataError(f"{source.path}: damaged {source.compression or source.format} file: {error}") from error


def _line_batches(source: Source) -> Iterator[Batch]:
    with open(source.path, "rb") as raw:
        stream = decompressed(raw, source.compression)
        parts: list[bytes] = []
        line, pending, read_before = 1, 0, 0
        while True:
            block = stream.read(BATCH_BYTES)
            cut = block.rfind(b"\n") + 1
            if not cut and source.format == "txt" and pending > LONGEST_TEXT_LINE:
                cut = _character_boundary(block)
            if cut or not block:
                data = b"".join((*parts, block[:cut]))
                parts, pending = [block[cut:]], len(block) - cut
                position = min(raw.tell(), source.size)
                yield Batch(source, line, data, position - read_before, not block)
                read_before = position
                line += data.count(b"\n")
            else:
                parts.append(block)
                pending += len(block)
            if not block:
                return


def _character_boundary(block: bytes) -> int:
    """Where the last whole UTF-8 character of a block ends (its continuation bytes are 10xxxxxx)."""
    cut = len(block)
    while cut > 0 and len(block) - cut < 4 and block[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if cut > 0 and block[cut - 1] >= 0xC0 else cut


def decompressed(raw: BinaryIO, compression: str) -> Readable:
    """The bytes of an opened file as they were before compression ("", gz or zst)."""
    if compression == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BATCH_BYTES)
    return _ZstdStream(raw) if compression == "zst" else raw


class Readable(Protocol):
    """What can be read in blocks."""

    def read(self, size: int, /) -> bytes:
        """Up to about `size` bytes; none at the end."""
        ...


class _ZstdStream:
    """Frames of a .zst file, one after the other. (zstandard's own stream reader takes a cut file for a whole one.)"""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._decompressor = raw, zstandard.ZstdDecompressor()
        self._frame: Any = None

    def read(self, size: int, /) -> bytes:
        """About `size` decompressed bytes; none at the end."""
        parts: list[bytes] = []
        have = 0
        while have < size:
            block = self._raw.read(1 << 17)
            if not block:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                break
            while block:
                self._frame = self._frame or self._decompressor.decompressobj()
                parts.append(self._frame.decompress(block))
                have += len(parts[-1])
                block = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        return b"".join(parts)


def _parquet_batches(source: Source) -> Iterator[Batch]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(source.path) as file:
        rows = 1
        groups = file.metadata.num_row_groups
        for group in range(groups):
            share = source.size * (group + 1) // groups - source.size * group // groups
            yield Batch(source, rows, b"", share, group + 1 == groups, row_group=group)
            rows += file.metadata.row_group(group).num_rows


def parse_batch(batch: Batch, text_key: str, txt_document: str) -> Iterator[Piece | BadLine]:
    """The texts of a batch, and what could not be used.

    Args:
        text_key: JSON field or parquet column that holds the text.
        txt_document: what one document of a .txt file is: "file" or "line".
    """
    if batch.source.format == "parquet":
        yield from _parse_parquet(batch, text_key)
    elif batch.source.format == "jsonl":
        for number, line in enumerate(batch.data.split(b"\n"), batch.first_line):
            if line.strip():
                yield _parse_json(line, str(batch.source.path), number, text_key)
    elif txt_document == "line":
        for number, line in enumerate(batch.data.split(b"\n"), batch.first_line):
            if line.strip():
                yield _decoded(line.rstrip(b"\r"), str(batch.source.path), number, True)
    else:
        yield from _parse_text(batch)


def _decoded(line: bytes, path: str, number: int, ends_document: bool) -> Piece | BadLine:
    try:
        return Piece(line.decode("utf-8"), ends_document)
    except UnicodeDecodeError as error:
        return BadLine(path, number, f"not UTF-8 (byte {error.start} of the line)")


def parse_json_line(line: bytes) -> Any:
    """The content of a line of JSON.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error


def _parse_json(line: bytes, path: str, number: int, text_key: str) -> Piece | BadLine:
    try:
        record = parse_json_line(line)
    except ValueError as error:
        return BadLine(path, number, str(error))
    if not isinstance(record, dict):
        return BadLine(path, number, f"expected an object with the field {text_key!r}, got {type(record).__name__}")
    text = record.get(text_key)
    if not isinstance(text, str):
        have = ", ".join(map(repr, list(record)[:8])) or "none"
        got = f"holds {type(text).__name__}" if text_key in record else f"is missing (fields: {have})"
        return BadLine(path, number, f"field {text_key!r} {got}, expected text")
    return Piece(text, True)


def _parse_text(batch: Batch) -> Iterator[Piece | BadLine]:
    """A whole-file document, in pieces cut at line ends; undecodable lines are reported and left out."""
    pieces: list[str] = []
    size, number = 0, batch.first_line
    for line in batch.data.splitlines(keepends=True) if b"\n" in batch.data else [batch.data]:
        item = _decoded(line, str(batch.source.path), number, False)
        number += line.endswith(b"\n")
        if isinstance(item, BadLine):
            yield item
            continue
        pieces.append(item.text)
        size += len(line)
        if size >= PIECE_BYTES:
            yield Piece("".join(pieces), False)
            pieces, size = [], 0
    if pieces or batch.ends_file:
        yield Piece("".join(pieces), batch.ends_file)


def _parse_parquet(batch: Batch, text_key: str) -> Iterator[Piece | BadLine]:
    import pyarrow.parquet as parquet

    path = str(batch.source.path)
    with parquet.ParquetFile(batch.source.path) as file:
        if text_key not in file.schema_arrow.names:
            have = ", ".join(map(repr, file.schema_arrow.names[:8]))
            yield BadLine(path, batch.first_line, f"no column {text_key!r} (columns: {have})")
            return
        row = batch.first_line
        for part in file.iter_batches(batch_size=1024, row_groups=[batch.row_group], columns=[text_key]):
            for text in part.column(0).to_pylist():
                if isinstance(text, str):
                    yield Piece(text, True)
                else:
                    yield BadLine(path, row, f"column {text_key!r} holds {type(text).__name__}, expected text")
                row += 1
