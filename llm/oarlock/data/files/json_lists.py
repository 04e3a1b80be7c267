"""Reading the elements of a JSON list in a file with their line numbers, in constant memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from oarlock.data.files import byte_streams
from oarlock.data.files.byte_streams import Readable, Source, open_source
from oarlock.data.files.json_text import DECODER, Unusable, check_nesting
from oarlock.errors import DataError

_ANYTHING = json.JSONDecoder(parse_int=len)  # finds the end of any element
MAX_RECORD_LENGTH = 1 << 26  # characters; a longer record means that the file is damaged


class _Window:
    """A window over the text of a file, with the line number of its position."""

    def __init__(self, source: Source, stream: Readable) -> None:
        self._source, self._stream = source, stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def read_more(self) -> None:
        """Drop the text before the position and read another block."""
        block = self._stream.read(byte_streams.BLOCK_BYTES)
        self.ended = not block
        self.text, self.position = self.text[self.position :], 0
        try:
            self.text += self._decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise DataError(f"{self._source.path}:{line}: not UTF-8") from error

    def advance(self, position: int) -> None:
        """Move to a position."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def peek_character(self) -> str:
        """Move to the next character that is neither whitespace nor a comma, and return it, or "" at the end."""
        while True:
            place = self.position
            while place < len(self.text) and self.text[place] in " \t\r\n,":
                place += 1
            self.advance(place)
            if place < len(self.text) or self.ended:
                return self.text[place : place + 1]
            self.read_more()


def read_json_list(source: Source) -> Iterator[tuple[list[tuple[int, Any]], int]]:
    """Yield batches of about a megabyte: [(line, element), ...], and the bytes read for them.

    Raises:
        DataError: for text that is not a list (file:line), because the next element can't be found then.
    """
    with open_source(source) as stream:
        window = _Window(source, stream)
        window.peek_character()
        window.advance(window.position + 1)  # the opening bracket
        items: list[tuple[int, Any]] = []
        size = 0
        while (first := window.peek_character()) != "]":
            if not first:
                raise DataError(f"{source.path}:{window.line}: the list is not closed (the file ends in the middle)")
            line, (item, length) = window.line, _read_element(window, source)
            items.append((line, item))
            size += length
            if size > byte_streams.BLOCK_BYTES:
                yield items, stream.consumed()
                items, size = [], 0
        window.advance(window.position + 1)
        if window.peek_character():
            raise DataError(f"{source.path}:{window.line}: more text after the end of the list")
        yield items, stream.consumed()


def _read_element(window: _Window, source: Source) -> tuple[Any, int]:
    """Return one element and its length. Reads more while the element may continue after the window."""
    while True:
        try:
            try:
                item, end = DECODER.raw_decode(window.text, window.position)
            except Unusable as error:  # it is the item
                item, end = error, _ANYTHING.raw_decode(window.text, window.position)[1]
            if end < len(window.text) or window.ended:
                length = end - window.position
                try:
                    check_nesting(window.text[window.position : end])
                except Unusable as error:
                    item = error
                window.advance(end)
                return item, length
        except RecursionError as error:
            raise DataError(f"{source.path}:{window.line}: objects and lists nested too deeply") from error
        except ValueError as error:
            # The next element can't be found, so reading ends even with --skip-bad.
            if window.ended or len(window.text) - window.position > MAX_RECORD_LENGTH:
                raise DataError(f"{source.path}:{window.line}: not valid JSON: {error}") from error
        # Doubles the window each time.
        for _ in range(max(1, (len(window.text) - window.position) // byte_streams.BLOCK_BYTES)):
            window.read_more()
