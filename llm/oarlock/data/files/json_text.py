"""Parsing the JSON of data records.

Duplicate fields are refused, because Python would silently keep the last one. Records may hold fields that are not used
here (NaN, numbers of any kind), so this is less strict than oarlock.formats is with configuration files: only what
Python can't read, or would read wrongly, is refused.
"""

from __future__ import annotations

import json
from typing import Any

from oarlock.formats.json_file import MAX_CONTAINERS, find_doubled_field, measure_nesting

MAX_DEPTH = 100  # levels of objects and lists; readers of records recurse into them
MAX_DIGITS = 1000  # of an integer; Python takes seconds to parse millions


class Unusable(ValueError):
    """Valid JSON that a record may not contain, such as a duplicate field."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unusable(f"{find_doubled_field(pairs)} appears twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Unusable(f"an integer of {len(digits):,} digits (at most {MAX_DIGITS:,} are read)")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)


def check_nesting(text: str) -> None:
    """Refuse JSON with too much nesting, or too many objects and lists, before any of them is built.

    Raises:
        Unusable: with the limit.
    """
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    levels, containers = measure_nesting(text.encode("utf-8", "surrogatepass"))
    if levels > MAX_DEPTH:
        raise Unusable(f"objects and lists more than {MAX_DEPTH} levels deep")
    if containers > MAX_CONTAINERS:
        raise Unusable(f"more than {MAX_CONTAINERS:,} objects and lists")


def parse_line(text: str) -> Any:
    """Parse a line (or any text) of JSON.

    Raises:
        ValueError: with the reason.
    """
    check_nesting(text)
    try:
        return DECODER.decode(text)
    except Unusable:
        raise
    except (ValueError, RecursionError) as error:
        several = " (an object over several lines? one line holds one)" if text.strip() in ("{", "[") else ""
        raise ValueError(f"not valid JSON: {error}{several}") from error
