"""Reading texts from files of any size in bounded memory: txt, jsonl, json lists, csv, tsv, parquet; also compressed.

A file is split into batches of about a megabyte. Each carries its first line number, so that a bad line can be reported
as file:line by the process that parses it. Texts are not changed, line breaks (CRLF) included. A byte order mark, and
the line break after a line of JSON, a row, or a one-line document, are not part of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from oarlock.data.corpus.text_chunks import TextSplitter
from oarlock.data.files import byte_streams
from oarlock.data.files.byte_streams import Source, decode_text, name_errors, open_source
from oarlock.data.files.json_lists import MAX_RECORD_LENGTH, read_json_list
from oarlock.data.files.json_text import parse_line
from oarlock.data.files.tables import read_table
from oarlock.errors import DataError

# A line that is longer is split between characters, so that memory stays bounded.
MAX_TEXT_LINE_LENGTH = 1 << 24


@dataclass(frozen=True)
class TextChunk:
    """Text to tokenize: a document, or a chunk of a document that is too long for memory.

    Attributes:
        begins_document, ends_document: whether it is the first and the last chunk.
        line: the line on which it begins.
    """

    text: str
    begins_document: bool = True
    ends_document: bool = True
    line: int = 0


@dataclass(frozen=True)
class BadLine:
    """A line or row that can't be used."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Batch:
    """A part of a source, small enough to send to a worker.

    Attributes:
        first_line: number of its first line, or of its first row in parquet, from 1.
        consumed: bytes of the file (before decompression) read for this batch.
        data: raw bytes of complete lines, not parsed yet.
        row_group: row group of a parquet file, which the worker reads itself, or -1.
        items: texts and errors that are parsed already.
    """

    source: Source
    first_line: int
    consumed: int
    data: bytes = b""
    row_group: int = -1
    items: tuple[TextChunk | BadLine, ...] = ()


def read_batches(
    source: Source, splitter: TextSplitter, text_key: str = "text", txt_document: str = "file"
) -> Iterator[Batch]:
    """Split a source into batches.

    Args:
        splitter: finds the positions at which a .txt document may be split.
        text_key, txt_document: see parse_batch.

    Raises:
        DataError: if the file can't be opened, decompressed or parsed.
    """
    if source.format == "parquet":
        with name_errors(source):
            yield from read_parquet_batches(source)
    elif source.format == "json":
        for elements, consumed in read_json_list(source):
            yield _make_batch(source, elements, consumed, text_key, "field")
    elif source.format in ("csv", "tsv"):
        for rows, consumed in read_table(source):
            yield _make_batch(source, rows, consumed, text_key, "column")
    elif source.format == "txt" and txt_document == "file":
        yield from _read_text_batches(source, splitter)
    else:
        yield from read_line_batches(source)


def read_line_batches(source: Source, cut_lines: bool = False) -> Iterator[Batch]:
    """Yield batches of complete lines as bytes. With `cut_lines`, lines above MAX_TEXT_LINE_LENGTH are split.

    Raises:
        DataError: for a line that is longer than any record, unless `cut_lines` (file:line).
    """
    with open_source(source) as stream:
        parts: list[bytes] = []
        line, pending = 1, 0
        while True:
            block = stream.read(byte_streams.BLOCK_BYTES)
            cut = block.rfind(b"\n") + 1
            if not cut and cut_lines and pending > MAX_TEXT_LINE_LENGTH:
                cut = len(block)  # the end of the last complete UTF-8 character (continuation bytes are 10xxxxxx)
                while cut > 0 and len(block) - cut < 4 and block[cut - 1] & 0xC0 == 0x80:
                    cut -= 1
                cut -= cut > 0 and block[cut - 1] >= 0xC0
            if cut or not block:
                data = b"".join((*parts, block[:cut]))
                parts, pending = [block[cut:]], len(block) - cut
                if data:
                    yield Batch(source, line, stream.consumed(), data)
                line += data.count(b"\n")
            else:
                parts.append(block)
                pending += len(block)
                if pending > MAX_RECORD_LENGTH:
                    raise DataError(
                        f"{source.path}:{line}: a line of more than {MAX_RECORD_LENGTH:,} bytes; is the file damaged?"
                    )
            if not block:
                return


def read_parquet_batches(source: Source) -> Iterator[Batch]:
    """Yield one batch per row group, without its content."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(source.path) as file:
        rows = 1
        groups = file.metadata.num_row_groups
        for group in range(groups):
            share = source.size * (group + 1) // groups - source.size * group // groups
            yield Batch(source, rows, share, row_group=group)
            rows += file.metadata.row_group(group).num_rows


def _read_text_batches(source: Source, splitter: TextSplitter) -> Iterator[Batch]:
    """Yield the chunks of a file that is one document. Lines that can't be decoded are reported and skipped."""
    text, begins, first_line, consumed = "", True, 1, 0
    for batch in read_line_batches(source, cut_lines=True):
        parts: list[str] = [text]
        bad: list[BadLine] = []
        for item in decode_lines(batch):
            bad += [item] if isinstance(item, BadLine) else []
            parts += [item] if isinstance(item, str) else []
        text, consumed = "".join(parts), consumed + batch.consumed
        done, text = (
            splitter.split_start(text, byte_streams.BLOCK_BYTES) if len(text) > byte_streams.BLOCK_BYTES else ("", text)
        )
        if done or bad:
            chunks = (TextChunk(done, begins, False, first_line),) if done else ()
            yield Batch(source, batch.first_line, consumed, items=(*bad, *chunks))
            begins, first_line, consumed = begins and not done, first_line + done.count("\n"), 0
    yield Batch(source, first_line, consumed, items=(TextChunk(text, begins, True, first_line),))


def decode_lines(batch: Batch) -> Iterator[str | BadLine]:
    """Decode the lines of a batch: as one text if all are valid, else line by line."""
    try:
        yield decode_text(batch.data)
        return
    except ValueError:
        pass
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", batch.data), batch.first_line):
        try:
            yield decode_text(line)
        except ValueError as error:
            yield BadLine(str(batch.source.path), number, str(error))


def _make_batch(source: Source, records: Iterable[tuple[int, Any]], consumed: int, text_key: str, field: str) -> Batch:
    items = tuple(_get_text(record, str(source.path), line, text_key, field) for line, record in records)
    return Batch(source, items[0].line if items else 1, consumed, items=items)


def parse_batch(batch: Batch, text_key: str, txt_document: str) -> Iterator[TextChunk | BadLine]:
    """Yield the texts of a batch, and the lines that can't be used.

    Args:
        text_key: JSON field or column with the text.
        txt_document: whether a document is a .txt file ("file") or a line of it ("line").
    """
    path = str(batch.source.path)
    yield from batch.items
    if batch.row_group >= 0:
        yield from _parse_parquet(batch, text_key)
    for number, line in enumerate(batch.data.split(b"\n"), batch.first_line):
        if not line.strip():
            continue
        try:
            if batch.source.format == "txt":
                yield TextChunk(decode_text(line.removesuffix(b"\r")).removeprefix("\ufeff"), line=number)
            else:
                yield _get_text(parse_json_line(line), path, number, text_key, "field")
        except ValueError as error:
            yield BadLine(path, number, str(error))


def parse_json_line(line: bytes) -> Any:
    """Parse a line of JSON.

    Raises:
        ValueError: with the reason.
    """
    return parse_line(decode_text(line).removeprefix("\ufeff"))


_SURROGATE = re.compile("[\ud800-\udfff]")


def check_characters(value: Any, name: str = "") -> None:
    """Refuse lone surrogates, which JSON can express (\\ud83d) and UTF-8 can't.

    Args:
        value: any JSON value.
        name: of its field.

    Raises:
        ValueError: with the field.
    """
    if isinstance(value, str):
        if not value.isascii() and (found := _SURROGATE.search(value)):
            at = f"field {name!r} " if name else ""
            raise ValueError(f"{at}contains a lone surrogate (\\u{ord(found[0]):04x})")
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_characters(key, name)
            check_characters(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            check_characters(inner, f"{name}[{i}]")


def _get_text(record: Any, path: str, line: int, text_key: str, field: str) -> TextChunk | BadLine:
    """Return the text of a record, or the reason why it can't be used."""
    if isinstance(record, ValueError):
        return BadLine(path, line, str(record))
    if not isinstance(record, dict):
        return BadLine(path, line, f"expected an object with the field {text_key!r}, got {type(record).__name__}")
    text = record.get(text_key)
    if not isinstance(text, str):
        have = ", ".join(map(repr, list(record)[:8])) or "none"
        got = f"holds {type(text).__name__}" if text_key in record else f"is missing ({field}s: {have})"
        return BadLine(path, line, f"{field} {text_key!r} {got}, expected a string")
    try:
        check_characters(text, text_key)
    except ValueError as error:
        return BadLine(path, line, str(error))
    return TextChunk(text, line=line)


def _parse_parquet(batch: Batch, text_key: str) -> Iterator[TextChunk | BadLine]:
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
                    yield TextChunk(text, line=row)
                else:
                    yield BadLine(path, row, f"column {text_key!r} holds {type(text).__name__}, expected a string")
                row += 1
