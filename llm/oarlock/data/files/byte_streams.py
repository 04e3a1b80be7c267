"""Reading plain, gzip and zstd data files in blocks, with errors that name the file."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from oarlock.errors import DataError
from oarlock.formats.files import open_regular

BLOCK_BYTES = 1 << 20
# Files of `zstd --long=31` need a window of this size. The default limit of the library is 128 MB.
_LARGEST_ZSTD_WINDOW = 1 << 31
# Compressed bytes per read. Four bytes can expand to 128 KB at once.
_ZSTD_INPUT = 1 << 11

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHER_ENCODINGS = {  # UTF-32 first: its mark starts with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        format: txt, jsonl, json (a list), csv, tsv or parquet.
        compression: "", gz or zst.
        size: bytes on disk.
    """

    path: Path
    format: str
    compression: str
    size: int


class Readable(Protocol):
    """An object that can be read in blocks."""

    def read(self, size: int, /) -> bytes:
        """Read up to about `size` bytes. Returns b"" at the end."""
        ...


def detect_compression(head: bytes) -> str:
    """Detect the compression of a file ("", gz or zst) from its first four bytes."""
    if head.startswith(_GZIP):
        return "gz"
    # A zstd file may begin with a skippable frame (pzstd, dictionaries, seek tables): 0x184D2A5?, little-endian.
    skippable = len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18"
    return "zst" if head.startswith(_ZSTD) or skippable else ""


@contextlib.contextmanager
def name_errors(source: Source) -> Iterator[None]:
    """Convert errors of reading a source to a DataError that names the file."""
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


class SourceStream:
    """The decompressed bytes of a source, without a UTF-8 byte order mark.

    Raises:
        DataError: for UTF-16 and UTF-32.
    """

    def __init__(self, source: Source, raw: BinaryIO) -> None:
        self._source, self._raw = source, raw
        self._stream = decompress(raw, source.compression)
        self._read_before, self._begun = 0, False

    def read(self, size: int = BLOCK_BYTES, /) -> bytes:
        """Read about `size` bytes. Returns b"" at the end."""
        block = self._stream.read(size)
        if not self._begun:
            self._begun = True
            while len(block) < 4 and (more := self._stream.read(size)):
                block += more
            for mark, name in _OTHER_ENCODINGS.items():
                if block.startswith(mark):
                    raise DataError(
                        f"{self._source.path}:1: the text is {name}, expected UTF-8; convert it: iconv -f {name} "
                        "-t UTF-8"
                    )
            return block.removeprefix(codecs.BOM_UTF8) or self._stream.read(size)
        return block

    def consumed(self) -> int:
        """Return the bytes of the file (before decompression) that were read since the last call."""
        position = min(self._raw.tell(), self._source.size)
        before, self._read_before = self._read_before, position
        return position - before


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[SourceStream]:
    """Open a source. Errors of reading it become a DataError that names the file."""
    with name_errors(source), open_regular(source.path, error=DataError) as raw:
        yield SourceStream(source, raw)


def decompress(raw: BinaryIO, compression: str) -> Readable:
    """Return a stream of the decompressed bytes of an open file (compression "", gz or zst)."""
    if compression == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK_BYTES)
    return _ZstdStream(raw) if compression == "zst" else raw


class _ZstdStream:
    """The frames of a .zst file. (The stream reader of zstandard accepts truncated files as complete.)"""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
        self._frame: Any = None

    def read(self, size: int, /) -> bytes:
        """Read about `size` decompressed bytes. Returns b"" at the end."""
        parts: list[bytes] = []
        have = 0
        while have < size:
            block = self._raw.read(_ZSTD_INPUT)
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


def decode_text(line: bytes) -> str:
    """Decode one or more lines.

    Raises:
        ValueError: if they are not UTF-8 text.
    """
    if b"\0" in line:
        raise ValueError("contains NUL bytes: not text, or UTF-16 (convert it: iconv -f UTF-16 -t UTF-8)")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from error
