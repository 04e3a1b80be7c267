"""The elements of a JSON list in a file, each with the line it begins on, without holding the list."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from oarlock.data.files import byte_streams
from oarlock.data.files.byte_streams import Readable, Source, opened
from oarlock.data.files.json_text import DECODER, Unusable, check_nesting
from oarlock.errors import DataError

_ANYTHING = json.JSONDecoder(parse_int=len)  # finds the end of an element, whatever it holds
LONGEST_RECORD = 1 << 26  # in characters; a longer one is taken for a damaged file


class _Window:
    """A moving stretch of the text of a file, with the line it stands on."""

    def __init__(self, source: Source, stream: Readable) -> None:
        self._source, self._stream = source, stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def more(self) -> None:
        """Drop what was passed and read on."""
        block = self._stream.read(byte_streams.BLOCK_BYTES)
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


def read_json_list(source: Source) -> Iterator[tuple[list[tuple[int, Any]], int]]:
    """Batches of about a megabyte: [(line, element), ...] and the bytes of the file that were read for them.

    Raises:
        DataError: for text that is not a list (file:line); where the next element begins can't be known then.
    """
    with opened(source) as stream:
        window = _Window(source, stream)
        window.next_character()
        window.advance(window.position + 1)  # the bracket
        items: list[tuple[int, Any]] = []
        size = 0
        while (first := window.next_character()) != "]":
            if not first:
                raise DataError(f"{source.path}:{window.line}: the list is not closed (the file ends in the middle)")
            line, (item, length) = window.line, _element(window, source)
            items.append((line, item))
            size += length
            if size > byte_streams.BLOCK_BYTES:
                yield items, stream.consumed()
                items, size = [], 0
        window.advance(window.position + 1)
        if window.next_character():
            raise DataError(f"{source.path}:{window.line}: more text after the end of the list")
        yield items, stream.consumed()


def _decoded(window: _Window) -> tuple[Any, int]:
    """The element that begins here, or what is wrong with it, and where it ends."""
    try:
        return DECODER.raw_decode(window.text, window.position)
    except Unusable as error:
        return error, _ANYTHING.raw_decode(window.text, window.position)[1]


def _element(window: _Window, source: Source) -> tuple[Any, int]:
    """One element and its length; reads on while it may be cut by the end of the window."""
    while True:
        try:
            item, end = _decoded(window)
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
            # Where the next element begins can't be known: this is the end even for skip_bad.
            if window.ended or len(window.text) - window.position > LONGEST_RECORD:
                raise DataError(f"{source.path}:{window.line}: not valid JSON: {error}") from error
        for _ in range(
            max(1, (len(window.text) - window.position) // byte_streams.BLOCK_BYTES)
        ):  # twice as much each time
            window.more()
