"""Values in files that programs run or read: one function for each format that has no writer of its own.

JSON is written by json, YAML by PyYAML's safe_dump, config.pbtxt by protobuf's text format; a shell script has none.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from oarlock.errors import ModelError


def shell_word(value: str | int | Path) -> str:
    """A value as one word of a POSIX shell, which nothing in it can end or have run.

    Raises:
        ModelError: for a text with a NUL, which no word can hold.
    """
    text = str(value)
    if "\0" in text:
        raise ModelError(f"{text!r} holds a NUL character, which no word of a shell can hold")
    return shlex.quote(text)
