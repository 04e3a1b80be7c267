"""A finding of a check, and how its texts are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.errors import ModelError, printable
from oarlock.formats.json_file import CONFIG_BYTES, read_json_if_there

_SHOWN = 80  # characters of a value


@dataclass(frozen=True)
class Finding:
    """A problem of an exported folder.

    Attributes:
        kind: the subject in one word, for programs.
        place: the file, and the field in it.
        problem: what is wrong, and how the server reacts.
        remedy: what to do.
    """

    kind: str
    place: str
    problem: str
    remedy: str

    def to_line(self) -> str:
        """Format the finding as one line for the console."""
        return printable(f"{self.place}: {self.problem}. {self.remedy}.".replace("\n", "\\n"))


def shown(names: list[str], most: int = 3) -> str:
    """Join the first names, with the number of all."""
    return ", ".join(names[:most]) + (f", ... ({len(names):,} in all)" if len(names) > most else "")


def format_value(value: Any) -> str:
    """Show a value of a file, shortened to fit on a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any] | str:
    """Read a JSON object; returns what is wrong with the file as text instead ("is missing" if there is none).

    Args:
        limit: largest size in bytes.
    """
    try:
        content = read_json_if_there(path, dict[str, Any], limit=limit)
    except ModelError as error:
        return f"can't be read ({str(error).removeprefix(str(path)).lstrip(':').strip()})"
    return "is missing" if content is None else content
