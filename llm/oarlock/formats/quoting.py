"""Quoting of values in generated files, for formats without a library that writes them.

JSON is written by json, YAML by PyYAML's safe_dump, and config.pbtxt by protobuf. Shell scripts need this module.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from oarlock.errors import ModelError


def quote_shell_word(value: str | int | Path) -> str:
    """Quote a value as one word of a POSIX shell.

    Raises:
        ModelError: if the value contains NUL, which no shell word can hold.
    """
    text = str(value)
    if "\0" in text:
        raise ModelError(f"{text!r} contains a NUL character, which a shell can't pass on")
    return shlex.quote(text)
