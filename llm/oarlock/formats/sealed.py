"""JSON files that end with a checksum of themselves, so that any change to them is detected."""

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


def seal_text(content: Mapping[str, Any]) -> str:
    """Return indented JSON whose last field, "sha256", is the checksum of the text before it.

    Raises:
        ValueError: for numbers that JSON does not have (infinity, NaN).
    """
    body = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    return f'{body},\n "{SEAL}": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def is_sealed(content: bytes) -> bool:
    """Whether a file ends with a checksum of itself, correct or not."""
    return _SEALED.fullmatch(content) is not None


def check_seal(content: bytes, name: str, error: type[OarlockError] = ModelError) -> None:
    """Refuse a file that changed after it was written.

    Args:
        name: of the file, for messages.

    Raises:
        OarlockError: of class `error`.
    """
    found = _SEALED.fullmatch(content)
    if found is None:
        raise error(f'{name}: it does not end with a checksum of itself ("{SEAL}"): changed, truncated, or not ours')
    if hashlib.sha256(found[1]).hexdigest().encode() != found[2]:
        raise error(f"{name}: its checksum does not match: it was changed or damaged after it was written")


def read_sealed(
    path: str | Path,
    schema: type[Checked],
    *,
    what: str,
    error: type[OarlockError] = ModelError,
    limit: int = CONFIG_BYTES,
) -> Checked:
    """Read a file with a checksum and check it against a schema that names all its fields, "sha256" included.

    Args:
        what: the kind of file, for messages.

    Raises:
        OarlockError: of class `error`, if the file is missing, not a regular file, changed, or of another form.
    """
    content = read_bytes(path, limit=limit, what=what, error=error)
    check_seal(content, str(path), error)
    return parse_json(content, str(path), schema, error=error, limit=limit, extra="forbid")
