"""Where fine-tuning records lie -> a stream of records with their line numbers, in bounded memory.

Files (.json lists, .jsonl, .parquet, .txt, plain or as .gz/.zst) are told apart by what they hold; find_records.py says
which files belong to what the user named.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from oarlock.data.readers import (
    BATCH_BYTES,
    BadLine,
    Batch,
    Readable,
    Source,
    decompressed,
    known_source,
    naming,
    parse_batch,
    parse_json_line,
    read_batches,
)
from oarlock.data.records import PlainText
from oarlock.errors import DataError
from oarlock.files import file_sha256_noted

LONGEST_RECORD = 1 << 26  # of a JSON list, in characters; a longer one is taken for a damaged file
_ROWS = 1000  # read at once from a dataset
_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}

# A record as it was read: JSON content, a piece of plain text, or what is wrong with the line.
Item = tuple[int, Any]


@dataclass(frozen=True)
class ItemBatch:
    """Some records of a source: (line or row from 1, content); `consumed` in the source's unit."""

    items: list[Item]
    consumed: int


class RecordSource(Protocol):
    """Records in a fixed order.

    Attributes:
        name: stands before :line in messages.
        size, unit: for a progress bar.
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def size(self) -> int:
        """See above."""
        ...

    @property
    def unit(self) -> str:
        """See above."""
        ...

    def batches(self) -> Iterator[ItemBatch]:
        """All records."""
        ...

    def digest(self, notes: Path) -> str:
        """Changes when the records do; `notes` is a folder that remembers what takes long."""
        ...


# files


@dataclass(frozen=True)
class FileRecords:
    """A file; `source.format` may also be "json", a list."""

    source: Source

    @classmethod
    def of(cls, path: Path) -> FileRecords:
        """A file of any kind, by its first bytes and, for plain text, its name.

        Raises:
            DataError: when it can't be read.
        """
        try:
            with open(path, "rb") as raw:
                head = raw.read(4)
                compression = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
                by_name = known_source(path)
                source = Source(path, "jsonl", compression, path.stat().st_size)
                if head == b"PAR1":
                    return cls(Source(path, "parquet", "", source.size))
                if by_name is not None and by_name.format in ("txt", "parquet"):
                    return cls(Source(path, by_name.format, compression, source.size))
                raw.seek(0)
                with naming(source):
                    first = _first_character(decompressed(raw, compression))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        return cls(Source(path, "json" if first == b"[" else "jsonl", compression, source.size))

    unit = "B"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.source.path)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.source.size

    def batches(self) -> Iterator[ItemBatch]:
        """Batches of about a megabyte."""
        if self.source.format == "json":
            with naming(self.source):
                yield from _list_batches(self.source)
            return
        parse = {"parquet": _rows, "jsonl": _json_lines, "txt": _texts}[self.source.format]
        for batch in read_batches(self.source):
            with naming(self.source):
                yield from parse(batch)

    def digest(self, notes: Path) -> str:
        """Of the bytes, and of how they are read."""
        return f"{self.source.format} {file_sha256_noted(self.source.path, notes)}"


def _first_character(stream: Readable) -> bytes:
    while block := stream.read(BATCH_BYTES):
        if text := block.removeprefix(codecs.BOM_UTF8).lstrip():
            return text[:1]
    return b""


def _json_lines(batch: Batch) -> Iterator[ItemBatch]:
    items = [
        (number, _parsed(line)) for number, line in enumerate(batch.data.split(b"\n"), batch.first_line) if line.strip()
    ]
    yield ItemBatch(items, batch.consumed)


def _parsed(line: bytes) -> Any:
    try:
        return parse_json_line(line)
    except ValueError as error:
        return error


def _texts(batch: Batch) -> Iterator[ItemBatch]:
    """A .txt file is one document, in pieces."""
    items: list[Item] = []
    line = batch.first_line
    for piece in parse_batch(batch, "text", "file"):
        if isinstance(piece, BadLine):
            items.append((piece.line, ValueError(piece.reason)))
        else:
            items.append((line, PlainText(piece.text, f"{batch.source.path}:{line}", piece.ends_document)))
            line += piece.text.count("\n")
    yield ItemBatch(items, batch.consumed)


def _rows(batch: Batch) -> Iterator[ItemBatch]:
    import pyarrow.parquet as parquet

    row, left = batch.first_line, batch.consumed
    with parquet.ParquetFile(batch.source.path) as file:
        for part in file.iter_batches(batch_size=_ROWS, row_groups=[batch.row_group]):
            yield ItemBatch(list(enumerate(part.to_pylist(), row)), left)
            row, left = row + part.num_rows, 0


class _Window:
    """A moving stretch of the text of a file, with the line it stands on."""

    def __init__(self, source: Source, stream: Readable) -> None:
        self._source, self._stream = source, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def more(self) -> None:
        """Drop what was passed and read on."""
        block = self._stream.read(BATCH_BYTES)
        self.ended = not block
        self.text, self.position = self.text[self.position :], 0
        try:
            self.text += self._decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise DataError(f"{self._source.path}:{line}: not UTF-8") from error

    def advance(self, position: int) -> None:
        """Go on to a position."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """The next one that is neither space nor a comma, "" at the end."""
        while True:
            place = self.position
            while place < len(self.text) and self.text[place] in " \t\r\n,":
                place += 1
            self.advance(place)
            if place < len(self.text) or self.ended:
                return self.text[place : place + 1]
            self.more()


def _list_batches(source: Source) -> Iterator[ItemBatch]:
    """The elements of a JSON list, each with the line it begins on, without holding the list."""
    decoder, read_before = json.JSONDecoder(), 0
    with open(source.path, "rb") as raw:
        window = _Window(source, decompressed(raw, source.compression))
        window.next_character()
        window.advance(window.position + 1)  # the bracket
        items: list[Item] = []
        size = 0
        while (first := window.next_character()) != "]":
            if not first:
                raise DataError(f"{source.path}:{window.line}: the list is not closed (the file ends in the middle)")
            line, (item, length) = window.line, _element(window, decoder, source)
            items.append((line, item))
            size += length
            if size > BATCH_BYTES:
                position = min(raw.tell(), source.size)
                yield ItemBatch(items, position - read_before)
                items, size, read_before = [], 0, position
        yield ItemBatch(items, source.size - read_before)


def _element(window: _Window, decoder: json.JSONDecoder, source: Source) -> tuple[Any, int]:
    """One element and its length; reads on while it may be cut by the end of the window."""
    while True:
        try:
            item, end = decoder.raw_decode(window.text, window.position)
            if end < len(window.text) or window.ended:
                length = end - window.position
                window.advance(end)
                return item, length
        except (ValueError, RecursionError) as error:
            # Where the next element begins can't be known: this is the end even for skip_bad.
            if window.ended or len(window.text) - window.position > LONGEST_RECORD:
                raise DataError(f"{source.path}:{window.line}: not valid JSON: {error}") from error
        for _ in range(max(1, (len(window.text) - window.position) // BATCH_BYTES)):  # twice as much each time
            window.more()


# records that are rows of something


@dataclass(frozen=True)
class RowRecords:
    """Rows of a list, or of a `datasets.Dataset`, which lies in Arrow files."""

    name: str
    rows: Any

    unit = "record"

    @property
    def size(self) -> int:
        """How many."""
        return len(self.rows)

    def batches(self) -> Iterator[ItemBatch]:
        """A thousand at a time."""
        for first in range(0, len(self.rows), _ROWS):
            part = self.rows[first : first + _ROWS]
            if isinstance(part, dict):  # columns
                part = [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)]
            yield ItemBatch(list(enumerate(part, first + 1)), len(part))

    def digest(self, notes: Path) -> str:
        """Of the Arrow files, or of the rows where there are none."""
        files = [Path(file["filename"]) for file in getattr(self.rows, "cache_files", [])]
        if files and getattr(self.rows, "_indices", None) is None:
            return "arrow " + " ".join(file_sha256_noted(file, notes) for file in files)
        digest = hashlib.sha256()
        for batch in self.batches():
            digest.update(json.dumps(batch.items, default=str).encode())
        return f"rows {digest.hexdigest()}"
