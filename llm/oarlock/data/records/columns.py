"""--columns: which field or column of people's data holds what.

"prompt=question,response=answer" reads a question from the column `question` and its answer from `answer`. Columns that
are not named are not read.
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
from oarlock.data.records.training_marks import lost_marks
from oarlock.environment.console import log_once
from oarlock.errors import ConfigError, DataError

# Names that may stand on the left, and what they mean. Those of one meaning are the words of different forms.
_MEANINGS = {
    **dict.fromkeys(("prompt", "question", "instruction", "src"), "prompt"),
    **dict.fromkeys(("response", "answer", "completion", "output", "tgt"), "response"),
    **dict.fromkeys(("input", "query", "context"), "input"),
    **{name: name for name in ("system", "history", "messages", "conversations", "tools", "text", "weight")},
}
_WHOLE = ("messages", "conversations", "text")  # forms of one field
_OPTIONAL = ("input", "system", "history", "tools", "weight")
_ALPACA = {"prompt": "instruction", "response": "output"}
_SRC_TGT = {"prompt": "src", "response": "tgt"}
_QUESTION_ANSWER = {"prompt": "question", "response": "answer"}


@dataclass(frozen=True)
class Columns:
    """A mapping.

    Attributes:
        column_of: field of a record form -> (column of the data, whether a record may lack it).
    """

    column_of: dict[str, tuple[str, bool]]

    @classmethod
    def parse(cls, text: str, data_format: str = "auto") -> Columns:
        """Of "field=column,..."; a part with a comma in it stands in double quotes.

        Raises:
            ConfigError: for an unknown field, one named twice, or no field with an answer.
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
                raise ConfigError(f"--columns {text}: {field!r} is named already (by it or another word for it)")
            chosen[_MEANINGS[field]] = column
            words.add(field)
        if not (any(name in chosen for name in _WHOLE) or {"prompt", "response"} <= set(chosen)):
            raise ConfigError(
                f"--columns {text}: name what is asked and what is answered (prompt=...,response=...), or one of "
                f"{', '.join(_WHOLE)}"
            )
        as_alpaca = data_format == "alpaca" or (
            data_format == "auto" and bool({"instruction", "output"} & words or {"input", "history"} & set(chosen))
        )
        fields = _ALPACA if as_alpaca else _QUESTION_ANSWER if data_format == "question_answer" else _SRC_TGT
        return cls({fields.get(name, name): (column, name in _OPTIONAL) for name, column in chosen.items()})

    def record(self, item: Any) -> dict[str, Any]:
        """A record with the fields of a form.

        Raises:
            ValueError: naming the column that is missing, and those that exist.
        """
        if not isinstance(item, dict):
            raise ValueError(f"expected an object, got {type(item).__name__}")
        for column, optional in self.column_of.values():
            if column not in item and not optional:
                have = ", ".join(map(repr, list(item)[:12])) or "none"
                raise ValueError(f"no column {column!r} (--columns); there are {have}")
        return {field: item[column] for field, (column, _) in self.column_of.items() if column in item}


@dataclass(frozen=True)
class MappedRecords:
    """A source whose records get the names of a form."""

    source: RecordSource
    columns: Columns

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def size(self) -> int:
        """The source's."""
        return self.source.size

    @property
    def unit(self) -> str:
        """The source's."""
        return self.source.unit

    def batches(self) -> Iterator[ItemBatch]:
        """The source's, with other names.

        Raises:
            DataError: for a column that no record of the source has, and for plain text, which has none.
        """
        named = {column for column, _ in self.columns.column_of.values()}
        never = {column for column, optional in self.columns.column_of.values() if optional}
        have: dict[str, None] = {}
        for batch in self.source.batches():
            items: list[tuple[int, Any]] = []
            for line, item in batch.items:
                if isinstance(item, PlainText):
                    raise DataError(f"{self.name}: plain text has no columns; leave --columns out, or this file")
                if isinstance(item, dict):
                    for lost in lost_marks(item.keys() - have.keys(), named):
                        log_once(f"{self.name}:{line}: column {lost!r} is not read: --columns does not name it")
                    never -= item.keys()
                    have |= dict.fromkeys(item) if len(have) < 100 else {}
                items.append((line, self._mapped(item)))
            yield ItemBatch(items, batch.consumed)
        if never and have:
            there = ", ".join(map(repr, list(have)[:12]))
            missing = ", ".join(map(repr, sorted(never)))
            raise DataError(f"{self.name}: no record has {missing} (--columns); there are {there}")

    def _mapped(self, item: Any) -> Any:
        if isinstance(item, ValueError):
            return item
        try:
            return parse_cells(self.columns.record(item))
        except ValueError as error:
            return error

    def digest(self, notes: Path) -> str:
        """Of the source and the mapping."""
        return f"{self.source.digest(notes)} {sorted(self.columns.column_of.items())}"
