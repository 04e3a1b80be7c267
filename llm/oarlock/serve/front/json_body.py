"""The JSON of a request's body: an object, bounded, each field once."""

from __future__ import annotations

from typing import Any

from oarlock.data.json_text import DECODER
from oarlock.serve.front.refusal import HttpRefusal


def read_object(body: bytes) -> dict[str, Any]:
    """The object.

    Raises:
        HttpRefusal: when it is none.
    """
    try:
        found = DECODER.decode(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise HttpRefusal(400, f"the request is not JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise HttpRefusal(400, "the request has to be a JSON object")
    return found
