"""Fine-tuning records as people have them -> conversations.

Forms: src/tgt (strings, or lists of equal length for several rounds) and Alpaca (instruction, input, output), in a
.json list or in .jsonl lines. Every record knows its file:line, so that a wrong one can be named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.errors import DataError

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages ({"role": user|assistant, "content": text}, ...) that end with an assistant's, and where they stood.

    An Alpaca user message also holds "instruction" and "input", which the alpaca template puts in their places.
    """

    messages: list[Message]
    where: str


@dataclass
class Records:
    """What a file gave: conversations, the form of its records, and what was left out with skip_bad."""

    conversations: list[Conversation]
    form: str
    bad: list[str] = field(default_factory=list)


def read_records(path: str | Path, form: str = "auto", skip_bad: bool = False) -> Records:
    """Read one .json or .jsonl file.

    Args:
        form: src_tgt, alpaca, or auto (by the fields of the first record).

    Raises:
        DataError: naming file:line, the field, and what was expected; with skip_bad only when nothing is usable.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8") from error
    items = _list_items(text, path) if text.lstrip()[:1] == "[" else _lines(text)
    return _collect(items, str(path), form, skip_bad)


def read_items(items: Iterable[Any], name: str, form: str = "auto", skip_bad: bool = False) -> Records:
    """The same for records that are in memory already (a hub dataset); `name`:number stands for file:line."""
    return _collect(enumerate(items, 1), name, form, skip_bad)


def _collect(items: Iterable[tuple[int, Any]], name: str, form: str, skip_bad: bool) -> Records:
    records = Records([], form)
    for line, item in items:
        where = f"{name}:{line}"
        try:
            if isinstance(item, ValueError):
                raise item
            if records.form == "auto":
                records.form = detect_form(item)
            records.conversations.append(parse_record(item, records.form, where))
        except ValueError as error:
            if not skip_bad:
                raise DataError(f"{where}: {error}") from error
            records.bad.append(f"{where}: {error}")
    if not records.conversations:
        raise DataError(f"{name}: no usable record" + (f" ({len(records.bad)} bad ones)" if records.bad else ""))
    return records


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, ValueError(f"not valid JSON: {error}")


def _list_items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, each with the line it begins on."""
    decoder = json.JSONDecoder()
    position, counted, line = text.index("[") + 1, 0, 1

    def skip(characters: str) -> int:
        place = position
        while place < len(text) and text[place] in characters:
            place += 1
        return place

    while True:
        position = skip(" \t\r\n,")
        line += text.count("\n", counted, position)
        counted = position
        if position >= len(text):
            raise DataError(f"{path}:{line}: the list is not closed (the file ends in the middle)")
        if text[position] == "]":
            return
        try:
            item, position = decoder.raw_decode(text, position)
        except ValueError as error:  # where the next element begins can't be known: this is the end even for skip_bad
            raise DataError(f"{path}:{line}: not valid JSON: {error}") from error
        yield line, item


def parse_record(item: Any, form: str, where: str) -> Conversation:
    """A record of a known form.

    Raises:
        ValueError: naming the field and what was expected there.
    """
    return Conversation(_FORMS[form](item), where)


def detect_form(item: Any) -> str:
    """The form of a record, by its fields.

    Raises:
        ValueError: listing the fields it has and the forms that are known.
    """
    if isinstance(item, dict):
        if "src" in item and "tgt" in item:
            return "src_tgt"
        if "instruction" in item and "output" in item:
            return "alpaca"
        if "messages" in item:
            return "messages"
    fields = ", ".join(map(repr, list(item)[:8])) if isinstance(item, dict) else type(item).__name__
    raise ValueError(f"unknown form of record ({fields}); known are src/tgt, instruction/input/output and messages")


def _text(item: dict[str, Any], name: str, required: bool = True) -> str:
    value = item.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        got = f"holds {type(value).__name__}" if name in item else "is missing"
        raise ValueError(f"field {name!r} {got}, expected text")
    return value


def _object(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, got {type(item).__name__}")
    return item


def _from_src_tgt(item: Any) -> list[Message]:
    item = _object(item)
    sides = []
    for name in ("src", "tgt"):
        value = item.get(name)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            sides.append(value)
        elif isinstance(value, list):
            raise ValueError(f"field {name!r} must be text or a list of texts with at least one")
        else:
            sides.append([_text(item, name)])
    sources, targets = sides
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} rounds in 'src' but {len(targets)} in 'tgt'")
    rounds = zip(sources, targets, strict=True)
    return [
        m for s, t in rounds for m in ({"role": "user", "content": s}, {"role": "assistant", "content": _answer(t)})
    ]


def _from_alpaca(item: Any) -> list[Message]:
    item = _object(item)
    instruction, more = _text(item, "instruction"), _text(item, "input", required=False)
    content = f"{instruction}\n{more}" if more else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": more}
    return [user, {"role": "assistant", "content": _answer(_text(item, "output"))}]


def _from_messages(item: Any) -> list[Message]:
    messages = _object(item).get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("field 'messages' must be a list with at least one message")
    found = [{name: _text(_object(message), name) for name in ("role", "content")} for message in messages]
    _answer(found[-1]["content"])
    return found


def _answer(text: str) -> str:
    if not text.strip():
        raise ValueError("the answer is empty: there is nothing to train on")
    return text


_FORMS: dict[str, Callable[[Any], list[Message]]] = {
    "src_tgt": _from_src_tgt,
    "alpaca": _from_alpaca,
    "messages": _from_messages,
}
