"""Where fine-tuning records lie -> a stream of records with their line numbers, in bounded memory.

Files (.json lists, .jsonl, .csv, .tsv, .parquet, .txt, plain or as .gz/.zst) are told apart by what they hold, tables
and plain text by their names; dataset_resolver.py says which files belong to what the user named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from oarlock.data.files import byte_streams
from oarlock.data.files.byte_streams import Source, detect_compression, name_errors, open_source
from oarlock.data.files.find_files import detect_source, explain_packed_file
from oarlock.data.files.json_lists import read_json_list
from oarlock.data.files.json_text import parse_line
from oarlock.data.files.tables import read_table
from oarlock.data.files.text_readers import (
    BadLine,
    Batch,
    check_characters,
    decode_lines,
    parse_json_line,
    read_line_batches,
    read_parquet_batches,
)
from oarlock.data.records.conversations import PlainText
from oarlock.errors import DataError
from oarlock.files import file_sha256_noted
from oarlock.formats.files import open_regular

# Fields that hold lists; tables have them as JSON text.
_LISTS = ("messages", "conversations", "history", "tools")
_ROWS = 1000  # read at once from a dataset

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
        if packed := explain_packed_file(path):
            raise DataError(f"{path}: {packed}")
        by_name = detect_source(path)
        if isinstance(by_name, Source) and by_name.format in ("txt", "csv", "tsv", "parquet"):
            return cls(by_name)
        try:
            with open_regular(path, error=DataError) as raw:
                head = raw.read(4)
            source = Source(path, "jsonl", detect_compression(head), path.stat().st_size)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        if head == b"PAR1":
            return cls(replace(source, format="parquet"))
        return cls(replace(source, format="json") if _first_character(source) == b"[" else source)

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
        if self.source.format in ("json", "csv", "tsv"):
            read = read_json_list if self.source.format == "json" else read_table
            for records, consumed in read(self.source):
                yield ItemBatch([(line, _record(record)) for line, record in records], consumed)
        elif self.source.format == "parquet":
            with name_errors(self.source):
                for batch in read_parquet_batches(self.source):
                    yield from _rows(batch)
        elif self.source.format == "txt":
            yield from _texts(self.source)
        else:
            yield from map(_json_lines, read_line_batches(self.source))

    def digest(self, notes: Path) -> str:
        """Of the bytes, and of how they are read."""
        return f"{self.source.format} {file_sha256_noted(self.source.path, notes)}"


def _first_character(source: Source) -> bytes:
    with open_source(source) as stream:
        while block := stream.read(byte_streams.BLOCK_BYTES):
            if text := block.lstrip():
                return text[:1]
    return b""


def _json_lines(batch: Batch) -> ItemBatch:
    lines = enumerate(batch.data.split(b"\n"), batch.first_line)
    return ItemBatch([(number, _parsed(line)) for number, line in lines if line.strip()], batch.consumed)


def _parsed(line: bytes) -> Any:
    try:
        return _checked(parse_json_line(line)) if b"\\u" in line else parse_json_line(line)
    except ValueError as error:
        return error


def _record(item: Any) -> Any:
    """A record of a table or a list, or what is wrong with it."""
    try:
        return _checked(parse_cells(item))
    except ValueError as error:
        return error


def parse_cells(item: Any) -> Any:
    """The record with its lists, where they stand as JSON text in a cell of a table.

    Raises:
        ValueError: naming the column.
    """
    if not isinstance(item, dict):
        return item
    parsed = {}
    for name in _LISTS:
        value = item.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                parsed[name] = parse_line(value)
            except ValueError as error:
                raise ValueError(f"column {name!r}: {error}") from error
    return item | parsed if parsed else item


def _checked(record: Any) -> Any:
    """The record, or what is wrong with its characters."""
    try:
        check_characters(record)
    except ValueError as error:
        return error
    return record


def _texts(source: Source) -> Iterator[ItemBatch]:
    """A .txt file is one document, in the parts it is read in; oarlock.data.examples.encode cuts it where its
    ids allow."""
    where, line, any_text = f"{source.path}:1", 1, False
    for batch in read_line_batches(source, cut_lines=True):
        items: list[Item] = []
        for item in decode_lines(batch):
            if isinstance(item, BadLine):
                items.append((item.line, ValueError(item.reason)))
            else:
                items.append((line, PlainText(item, where, ends=False)))
                line, any_text = line + item.count("\n"), any_text or bool(item)
        yield ItemBatch(items, batch.consumed)
    if any_text:
        yield ItemBatch([(line, PlainText("", where, ends=True))], 0)


def _rows(batch: Batch) -> Iterator[ItemBatch]:
    import pyarrow.parquet as parquet

    row, left = batch.first_line, batch.consumed
    with parquet.ParquetFile(batch.source.path) as file:
        for part in file.iter_batches(batch_size=_ROWS, row_groups=[batch.row_group]):
            yield ItemBatch(list(enumerate(part.to_pylist(), row)), left)
            row, left = row + part.num_rows, 0


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
