"""Reading fine-tuning records with their line numbers, in bounded memory.

The format of a file (.json list, .jsonl, .csv, .tsv, .parquet, .txt, plain or as .gz/.zst) is detected from its
content, or from its name for tables and plain text. dataset_resolver.py finds the files.
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
    check_characters,
    decode_lines,
    parse_json_line,
    read_line_batches,
    read_parquet_batches,
)
from oarlock.data.records.conversations import PlainText
from oarlock.errors import DataError
from oarlock.files import compute_sha256_cached
from oarlock.formats.files import open_regular

# Fields that hold lists. In tables they are JSON text.
_LISTS = ("messages", "conversations", "history", "tools")
_ROWS = 1000  # rows of a dataset per batch

# A line (or row) number from 1, and a record: JSON content, a part of a plain text, or a ValueError.
Item = tuple[int, Any]


@dataclass(frozen=True)
class ItemBatch:
    """Records of a source. `consumed` is in the unit of the source."""

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
        """Name for messages."""
        ...

    @property
    def size(self) -> int:
        """Size, for a progress bar."""
        ...

    @property
    def unit(self) -> str:
        """Unit of the size."""
        ...

    def batches(self) -> Iterator[ItemBatch]:
        """Read all records."""
        ...

    def digest(self, notes: Path) -> str:
        """Return a digest of the records. Hashes of files are cached in the folder `notes`."""
        ...


# files


@dataclass(frozen=True)
class FileRecords:
    """The records of a file. `source.format` may also be "json", a list."""

    source: Source

    @classmethod
    def detect(cls, path: Path) -> FileRecords:
        """Open a file of any format, detected from its first bytes and, for plain text and tables, its name.

        Raises:
            DataError: if it can't be read.
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
        text = b""
        with open_source(source) as stream:
            while not text and (block := stream.read(byte_streams.BLOCK_BYTES)):
                text = block.lstrip()
        return cls(replace(source, format="json") if text.startswith(b"[") else source)

    unit = "B"

    @property
    def name(self) -> str:
        """Path of the file."""
        return str(self.source.path)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.source.size

    def batches(self) -> Iterator[ItemBatch]:
        """Read batches of about a megabyte."""
        if self.source.format in ("json", "csv", "tsv"):
            read = read_json_list if self.source.format == "json" else read_table
            for records, consumed in read(self.source):
                items: list[Item] = []
                for line, record in records:
                    try:
                        items.append((line, _check_record(parse_cells(record))))
                    except ValueError as error:
                        items.append((line, error))
                yield ItemBatch(items, consumed)
        elif self.source.format == "parquet":
            import pyarrow.parquet as parquet

            with name_errors(self.source):
                for batch in read_parquet_batches(self.source):
                    row, left = batch.first_line, batch.consumed
                    with parquet.ParquetFile(self.source.path) as file:
                        for part in file.iter_batches(batch_size=_ROWS, row_groups=[batch.row_group]):
                            yield ItemBatch(list(enumerate(part.to_pylist(), row)), left)
                            row, left = row + part.num_rows, 0
        elif self.source.format == "txt":
            yield from _read_text_parts(self.source)
        else:
            for batch in read_line_batches(self.source):
                items = []
                for number, text in enumerate(batch.data.split(b"\n"), batch.first_line):
                    if text.strip():
                        try:
                            record = parse_json_line(text)
                            items.append((number, _check_record(record) if b"\\u" in text else record))
                        except ValueError as error:
                            items.append((number, error))
                yield ItemBatch(items, batch.consumed)

    def digest(self, notes: Path) -> str:
        """Return a digest of the bytes and of the format."""
        return f"{self.source.format} {compute_sha256_cached(self.source.path, notes)}"


def parse_cells(item: Any) -> Any:
    """Parse the lists of a record that a table holds as JSON text.

    Raises:
        ValueError: with the column.
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


def _check_record(record: Any) -> Any:
    """Return the record, or a ValueError if its characters are invalid."""
    try:
        check_characters(record)
    except ValueError as error:
        return error
    return record


def _read_text_parts(source: Source) -> Iterator[ItemBatch]:
    """Read a .txt file as one document in parts. oarlock.data.examples.encode splits it where its tokens allow."""
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


# records that are rows of something


@dataclass(frozen=True)
class RowRecords:
    """Rows of a list, or of a `datasets.Dataset` (Arrow files)."""

    name: str
    rows: Any

    unit = "record"

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def batches(self) -> Iterator[ItemBatch]:
        """Read batches of 1,000 rows."""
        for first in range(0, len(self.rows), _ROWS):
            part = self.rows[first : first + _ROWS]
            if isinstance(part, dict):  # columns
                part = [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)]
            yield ItemBatch(list(enumerate(part, first + 1)), len(part))

    def digest(self, notes: Path) -> str:
        """Return a digest of the Arrow files, or of the rows if there are none."""
        files = [Path(file["filename"]) for file in getattr(self.rows, "cache_files", [])]
        if files and getattr(self.rows, "_indices", None) is None:
            return "arrow " + " ".join(compute_sha256_cached(file, notes) for file in files)
        digest = hashlib.sha256()
        for batch in self.batches():
            digest.update(json.dumps(batch.items, default=str).encode())
        return f"rows {digest.hexdigest()}"
