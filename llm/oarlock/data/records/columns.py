"""--columns: which columns of the data hold the fields of a record.

"prompt=question,response=answer" reads the question from the column `question` and its answer from `answer`. Other
columns are ignored.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.config.options import shown
from oarlock.data.records.conversations import PlainText
from oarlock.data.records.record_stream import ItemBatch, RecordSource, parse_cells
from oarlock.data.records.training_marks import find_lost_marks
from oarlock.environment.console import log_once
from oarlock.errors import ConfigError, DataError

# Field names that --columns accepts -> their meaning. Different record forms name the same field differently.
_MEANINGS = {
    **dict.fromkeys(("prompt", "question", "instruction", "src"), "prompt"),
    **dict.fromkeys(("response", "answer", "completion", "output", "tgt"), "response"),
    **dict.fromkeys(("input", "query", "context"), "input"),
    **{name: name for name in ("system", "history", "messages", "conversations", "tools", "text", "weight")},
}
_SINGLE_FIELDS = ("messages", "conversations", "text")  # forms of one field
_OPTIONAL = ("input", "system", "history", "tools", "weight")
_ALPACA = {"prompt": "instruction", "response": "output"}
_SRC_TGT = {"prompt": "src", "response": "tgt"}
_QUESTION_ANSWER = {"prompt": "question", "response": "answer"}


@dataclass(frozen=True)
class Columns:
    """A mapping of columns to fields.

    Attributes:
        column_of: field of a record form -> (column of the data, whether it is optional).
    """

    column_of: dict[str, tuple[str, bool]]

    @classmethod
    def parse(cls, text: str, data_format: str = "auto") -> Columns:
        """Parse "field=column,...". A part that contains a comma is put in double quotes.

        Raises:
            ConfigError: for an unknown or duplicate field, or if no field holds answers.
        """
        chosen: dict[str, str] = {}
        words: set[str] = set()
        try:
            parts = next(csv.reader([text], skipinitialspace=True), [])
        except csv.Error as error:
            raise ConfigError(f"--columns {shown(text)}: {error}") from error
        for part in parts:
            field, equals, column = (word.strip() for word in part.partition("="))
            if not equals or not column:
                raise ConfigError(f"--columns {text}: {part!r} is not field=column")
            if field not in _MEANINGS:
                raise ConfigError(f"--columns {text}: unknown field {field!r}; known are {', '.join(_MEANINGS)}")
            if _MEANINGS[field] in chosen:
                raise ConfigError(f"--columns {text}: {field!r} is given twice (maybe by another name)")
            chosen[_MEANINGS[field]] = column
            words.add(field)
        if not (any(name in chosen for name in _SINGLE_FIELDS) or {"prompt", "response"} <= set(chosen)):
            raise ConfigError(
                f"--columns {text}: name the columns of question and answer (prompt=...,response=...), or one of "
                f"{', '.join(_SINGLE_FIELDS)}"
            )
        as_alpaca = data_format == "alpaca" or (
            data_format == "auto" and bool({"instruction", "output"} & words or {"input", "history"} & set(chosen))
        )
        fields = _ALPACA if as_alpaca else _QUESTION_ANSWER if data_format == "question_answer" else _SRC_TGT
        return cls({fields.get(name, name): (column, name in _OPTIONAL) for name, column in chosen.items()})

    def map_record(self, item: Any) -> dict[str, Any]:
        """Rename the columns of a record to fields.

        Raises:
            ValueError: for a missing column, with the columns that exist.
        """
        if not isinstance(item, dict):
            raise ValueError(f"expected an object, got {type(item).__name__}")
        for column, optional in self.column_of.values():
            if column not in item and not optional:
                have = ", ".join(map(repr, list(item)[:12])) or "none"
                raise ValueError(f"no column {column!r} (--columns); the columns are {have}")
        return {field: item[column] for field, (column, _) in self.column_of.items() if column in item}


@dataclass(frozen=True)
class MappedRecords:
    """Another source, with --columns applied."""

    source: RecordSource
    columns: Columns

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.source.name

    @property
    def size(self) -> int:
        """Size of the source."""
        return self.source.size

    @property
    def unit(self) -> str:
        """Unit of the size."""
        return self.source.unit

    def batches(self) -> Iterator[ItemBatch]:
        """Read the batches of the source and rename their columns.

        Raises:
            DataError: for an optional column that no record has, and for plain text, which has no columns.
        """
        named = {column for column, _ in self.columns.column_of.values()}
        never = {column for column, optional in self.columns.column_of.values() if optional}
        have: dict[str, None] = {}
        for batch in self.source.batches():
            items: list[tuple[int, Any]] = []
            for line, item in batch.items:
                if isinstance(item, PlainText):
                    raise DataError(f"{self.name}: plain text has no columns; omit --columns, or this file")
                if isinstance(item, dict):
                    for lost in find_lost_marks(item.keys() - have.keys(), named):
                        log_once(f"{self.name}:{line}: column {lost!r} is ignored: --columns does not name it")
                    never -= item.keys()
                    have |= dict.fromkeys(item) if len(have) < 100 else {}
                if isinstance(item, ValueError):
                    items.append((line, item))
                    continue
                try:
                    items.append((line, parse_cells(self.columns.map_record(item))))
                except ValueError as error:
                    items.append((line, error))
            yield ItemBatch(items, batch.consumed)
        if never and have:
            there = ", ".join(map(repr, list(have)[:12]))
            missing = ", ".join(map(repr, sorted(never)))
            raise DataError(f"{self.name}: no record has {missing} (--columns); the columns are {there}")

    def digest(self, notes: Path) -> str:
        """Return a digest of the source and the mapping."""
        return f"{self.source.digest(notes)} {sorted(self.columns.column_of.items())}"
