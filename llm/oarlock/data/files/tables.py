"""Reading the rows of .csv and .tsv files with their line numbers, in constant memory.

The first row names the columns. Quoting follows RFC 4180, as written by spreadsheets and pandas: a field in double
quotes may contain separators, line breaks and doubled quotes. All values are strings.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from oarlock.data.files import byte_streams
from oarlock.data.files.byte_streams import Source, SourceStream, decode_text, open_source
from oarlock.data.files.json_lists import MAX_RECORD_LENGTH
from oarlock.errors import DataError

_SEPARATORS = {"csv": ",", "tsv": "\t"}


def read_table(source: Source) -> Iterator[tuple[list[tuple[int, Any]], int]]:
    """Yield batches of about a megabyte: [(line, {column: text} or a ValueError), ...], and the bytes read.

    Raises:
        DataError: for a missing or wrong header, or a quote that is never closed (file:line).
    """
    separator = _SEPARATORS[source.format]
    with open_source(source) as stream:
        lines = _Lines(source, stream)
        csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_LENGTH))
        rows = csv.reader(lines, delimiter=separator, strict=True)
        columns = _read_header(source, rows, separator)
        items: list[tuple[int, Any]] = []
        while True:
            line = lines.number + 1
            try:
                row = next(rows)
            except StopIteration:
                break
            except (csv.Error, ValueError) as error:
                if "unexpected end of data" in str(error) or "field larger" in str(error):
                    raise DataError(f"{source.path}:{line}: a quote that opens in this row is not closed") from error
                last = lines.number
                if isinstance(error, ValueError) and last > line:  # the following lines may belong to this row
                    raise DataError(
                        f"{source.path}:{last}: {error}, within a row that begins on line {line}"
                    ) from error
                where = f" (lines {line} to {last})" if last > line else ""
                problem = str(error) if isinstance(error, ValueError) else f"wrong quotes{where}: {error}"
                items.append((line, ValueError(problem)))
                continue
            if row:
                items.append((line, _record(columns, row)))
            if lines.size > byte_streams.BLOCK_BYTES:
                yield items, stream.consumed()
                items, lines.size = [], 0
        yield items, stream.consumed()


def _read_header(source: Source, rows: Any, separator: str) -> list[str]:
    try:
        columns = next((row for row in rows if row), None)
    except (csv.Error, ValueError) as error:
        raise DataError(f"{source.path}:1: the header can't be read: {error}") from error
    if columns is None:
        raise DataError(f"{source.path}: no header: the first row must name the columns")
    names = [name.strip() for name in columns]
    doubled = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if doubled:
        raise DataError(f"{source.path}:1: the header names {', '.join(map(repr, doubled))} more than once")
    other = next((mark for mark in (";", "\t", ",", "|") if mark != separator and mark in names[0]), None)
    if len(names) == 1 and other:
        raise DataError(
            f"{source.path}:1: one column {names[0]!r}: a .{source.format} file uses the separator {separator!r}, this "
            f"one seems to use {other!r}; save it as a .csv with commas or a .tsv with tabs"
        )
    return names


def _record(columns: list[str], row: list[str]) -> dict[str, str] | ValueError:
    if len(row) != len(columns):
        return ValueError(f"the row has {len(row)} fields, the header names {len(columns)}")
    return {name: value for name, value in zip(columns, row, strict=True) if name}


class _Lines(Iterator[str]):
    """Lines with their line breaks, for csv.reader. `number` counts them, `size` their bytes."""

    def __init__(self, source: Source, stream: SourceStream) -> None:
        self._source, self._buffer = source, io.BufferedReader(_Raw(stream), byte_streams.BLOCK_BYTES)
        self.number = self.size = 0

    def __next__(self) -> str:
        line = self._buffer.readline(MAX_RECORD_LENGTH + 1)
        if not line:
            raise StopIteration
        if len(line) > MAX_RECORD_LENGTH:
            raise DataError(
                f"{self._source.path}:{self.number + 1}: a line of more than {MAX_RECORD_LENGTH:,} bytes; is the file "
                "damaged?"
            )
        self.number += 1
        self.size += len(line)
        return decode_text(line)


class _Raw(io.RawIOBase):
    """A SourceStream with the interface of io.RawIOBase."""

    def __init__(self, stream: SourceStream) -> None:
        self._stream, self._rest = stream, b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into the buffer and return the number of bytes."""
        self._rest = self._rest or self._stream.read(len(buffer))
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
