"""What a check of an exported directory finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.errors import ModelError, printable
from oarlock.formats.json_file import CONFIG_BYTES, read_json_if_there

_SHOWN = 80  # characters of a value


@dataclass(frozen=True)
class Finding:
    """One thing that would go wrong.

    Attributes:
        kind: one word for what it is about, for programs.
        place: file, and what in it.
        problem: what is wrong, and what the server makes of it.
        remedy: what to do.
    """

    kind: str
    place: str
    problem: str
    remedy: str

    def text(self) -> str:
        """One line for the console."""
        return printable(f"{self.place}: {self.problem}. {self.remedy}.".replace("\n", "\\n"))


def shown(names: list[str], most: int = 3) -> str:
    """The first of some names."""
    return ", ".join(names[:most]) + (f", ... ({len(names):,} in all)" if len(names) > most else "")


def shown_value(value: Any) -> str:
    """A value of a file, so much of it as a line of the console holds."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any] | str:
    """A JSON object of a file, or what is wrong with the file ("is missing" where nothing has the name).

    Args:
        limit: the most bytes it may have.
    """
    try:
        content = read_json_if_there(path, dict[str, Any], limit=limit)
    except ModelError as error:
        return f"can't be read ({str(error).removeprefix(str(path)).lstrip(':').strip()})"
    return "is missing" if content is None else content
