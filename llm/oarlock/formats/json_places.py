"""Finding the line of a field in a JSON text, for error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+', re.DOTALL)

_MAX_CHARACTERS = 1 << 23  # scanning more takes seconds

Field = tuple[str | int, ...]


def locate_fields(text: str) -> Iterator[tuple[Field, int]]:
    """Yield every field and element of a valid JSON text in order, with the line that it begins on."""
    path: list[str | int] = []
    kinds: list[str] = []  # open brackets
    line, counted, key = 1, 0, ""
    for token in _TOKEN.finditer(text):
        line += text.count("\n", counted, token.start())
        counted, word = token.start(), token[0]
        if word == ":":
            path[-1] = key
            yield tuple(path), line
        elif word == ",":
            if kinds[-1] == "[":
                path[-1] = int(path[-1]) + 1
        elif word in "]}":
            kinds.pop()
            path.pop()
        else:
            if kinds and kinds[-1] == "[":
                yield tuple(path), line
            if word in "[{":
                kinds.append(word)
                path.append(0)
            elif word.startswith('"'):
                key = json.loads(word, strict=False)


def find_line(text: str, field: Field) -> int:
    """Return the line of a field in a valid JSON text. 0 for the root, or if the text is too long to search."""
    if not field or len(text) > _MAX_CHARACTERS:
        return 0
    if "\n" not in text:
        return 1
    return next((line for place, line in locate_fields(text) if place == field), 0)


def find_doubled_line(text: str) -> int:
    """Return the line of the first duplicate field in a JSON text, or 0 if the text is too long to search."""
    if len(text) > _MAX_CHARACTERS:
        return 0
    if "\n" not in text:
        return 1
    seen: list[set[Field]] = []  # by depth
    try:
        for place, line in locate_fields(text):
            del seen[len(place) :]
            while len(seen) < len(place):
                seen.append(set())
            if isinstance(place[-1], str) and place in seen[-1]:
                return line
            seen[-1].add(place)
    except (ValueError, IndexError, RecursionError):
        pass  # invalid further on; the parser reported the duplicate before that
    return 0


def find_too_deep_line(text: str, depth: int) -> int:
    """Return the line of the first bracket that exceeds a nesting depth."""
    level = 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            level += 1
            if level > depth:
                return text.count("\n", 0, token.start()) + 1
        elif token[0] in "]}":
            level -= 1
    return 1
