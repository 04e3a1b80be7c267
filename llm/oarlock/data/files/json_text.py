"""JSON of data. An object that names a field twice is wrong; Python would take the last of the two in silence.

Records may hold what concerns nobody here (NaN beside the text, numbers of any kind), so this is not as strict as
oarlock.formats is with settings: only what Python can't take, or would take wrongly, is refused.
"""

from __future__ import annotations

import json
from typing import Any

from oarlock.formats.json_file import MAX_CONTAINERS, doubled_field, nesting

DEEPEST = 100  # levels of objects and lists; what reads records goes down them by recursion
LONGEST_NUMBER = 1000  # digits of a whole number; Python takes seconds for millions


class Unusable(ValueError):
    """What JSON's grammar allows and no record may hold: a field that appears twice in one object, for example."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unusable(f"{doubled_field(pairs)} appears twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise Unusable(f"a whole number of {len(digits):,} digits (at most {LONGEST_NUMBER:,} are read)")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)


def check_nesting(text: str) -> None:
    """Refuse JSON that is too deep, or has too many parts, before anything is built of it.

    Raises:
        Unusable: saying so.
    """
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    levels, containers = nesting(text.encode("utf-8", "surrogatepass"))
    if levels > DEEPEST:
        raise Unusable(f"objects and lists more than {DEEPEST} levels deep")
    if containers > MAX_CONTAINERS:
        raise Unusable(f"more than {MAX_CONTAINERS:,} objects and lists")


def parse_line(text: str) -> Any:
    """The content of a line, or of any text that holds JSON.

    Raises:
        ValueError: saying what is wrong with it.
    """
    check_nesting(text)
    try:
        return DECODER.decode(text)
    except Unusable:
        raise
    except (ValueError, RecursionError) as error:
        several = " (an object over several lines? one line holds one)" if text.strip() in ("{", "[") else ""
        raise ValueError(f"not valid JSON: {error}{several}") from error
