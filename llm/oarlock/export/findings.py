"""What a check of an exported directory finds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        return f"{self.place}: {self.problem}. {self.remedy}."


def shown(names: list[str], most: int = 3) -> str:
    """The first of some names."""
    return ", ".join(names[:most]) + (f", ... ({len(names):,} in all)" if len(names) > most else "")


def shown_value(value: Any) -> str:
    """A value of a file, so much of it as a line of the console holds."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def read_object(path: Path) -> dict[str, Any] | str:
    """A JSON object of a file, or what is wrong with the file."""
    if not path.is_file():
        return "is missing"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"can't be read as JSON ({error})"
    return content if isinstance(content, dict) else "is not a JSON object"
