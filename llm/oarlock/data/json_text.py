"""JSON of data. An object that names a field twice is wrong; Python would take the last of the two in silence."""

from __future__ import annotations

import json
from typing import Any


class DoubledField(ValueError):
    """A field that stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise DoubledField(f"field {twice!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_line(text: str) -> Any:
    """The content of a line.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        return DECODER.decode(text)
    except DoubledField:
        raise
    except (ValueError, RecursionError) as error:
        several = " (an object over several lines? one line holds one)" if text.strip() in ("{", "[") else ""
        raise ValueError(f"not valid JSON: {error}{several}") from error
