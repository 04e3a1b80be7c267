"""JSON files of our own that carry a checksum of themselves: read byte for byte as they were written, or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from oarlock.errors import ModelError, OarlockError
from oarlock.formats.files import read_bytes
from oarlock.formats.json_file import CONFIG_BYTES, parse_json

Checked = TypeVar("Checked")

SEAL = "sha256"
_SEALED = re.compile(rb'(\{.*),\n "sha256": "([0-9a-f]{64})"\n\}\n', re.DOTALL)


def sealed_text(content: Mapping[str, Any]) -> str:
    """JSON that people can read, with the checksum of all that stands before it as its last field, "sha256".

    Raises:
        ValueError: for numbers that JSON has not (infinity).
    """
    body = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    return f'{body},\n "{SEAL}": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def is_sealed(content: bytes) -> bool:
    """Whether a file ends with a checksum of itself, right or wrong."""
    return _SEALED.fullmatch(content) is not None


def check_seal(content: bytes, name: str, error: type[OarlockError] = ModelError) -> None:
    """Refuse what is not byte for byte what was written.

    Args:
        name: of the file, for messages.

    Raises:
        OarlockError: of the class given.
    """
    found = _SEALED.fullmatch(content)
    if found is None:
        raise error(f'{name}: it does not end with the checksum of itself ("{SEAL}"): changed, cut, or not of ours')
    if hashlib.sha256(found[1]).hexdigest().encode() != found[2]:
        raise error(f"{name}: its checksum of itself differs: it was changed or damaged after it was written")


def read_sealed(
    path: str | Path,
    schema: type[Checked],
    *,
    what: str,
    error: type[OarlockError] = ModelError,
    limit: int = CONFIG_BYTES,
) -> Checked:
    """The content of such a file as its schema describes it, which names all of its fields, "sha256" too.

    Args:
        what: it is, for messages.

    Raises:
        OarlockError: of the class given: missing, no regular file, not exactly what was written, of another form.
    """
    content = read_bytes(path, limit=limit, what=what, error=error)
    check_seal(content, str(path), error)
    return parse_json(content, str(path), schema, error=error, limit=limit, extra="forbid")
