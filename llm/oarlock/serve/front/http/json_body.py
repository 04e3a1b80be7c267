"""Reads the JSON body of a request: an object, bounded in depth, each field once, finite numbers."""

from __future__ import annotations

from typing import Any

from oarlock.errors import RequestRefused
from oarlock.formats.json_file import parse_json
from oarlock.serve.front.http.refusal import HttpRefusal

_ANY_SIZE = 1 << 62  # the size was limited while the body arrived


def read_object(body: bytes) -> dict[str, Any]:
    """Read the object.

    Raises:
        HttpRefusal: when it is not an object.
    """
    try:
        return parse_json(body, "the request", dict[str, Any], error=RequestRefused, limit=_ANY_SIZE)
    except RequestRefused as error:
        raise HttpRefusal(400, str(error)) from error
