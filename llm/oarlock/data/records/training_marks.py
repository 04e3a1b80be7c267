"""Marks in fine-tuning records that say which answers are trained on, as other trainers write them.

On a message: OpenAI's weight, axolotl's train and training, ms-swift's loss, train_on_turn, loss_mask and the like, as
number, word or boolean. On a record: the same names, for all its answers or as a list with one value for each message.
An answer is trained on or only read; a mark for anything between is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_MARKS = (
    *("weight", "train", "training", "trainable", "loss", "train_on_turn", "train_mask"),
    *("loss_mask", "loss_weight", "loss_scale"),
)
_PARTS = ("train_detail", "training_detail", "train_on_spans", "loss_spans")  # of an answer
_WORDS = {
    **dict.fromkeys(("0", "0.0", "false", "no", "off", "n", "f"), False),
    **dict.fromkeys(("1", "1.0", "true", "yes", "on", "y", "t"), True),
}
# Fields that may tell a trainer, or a model, something, and that nothing here reads.
_ALIKE = re.compile(
    r"(^|_)(train\w*|loss\w*|weights?|mask(ed)?|ignored?|skip(ped)?|labels?|targets?|rewards?|scores?|chosen|rejected"
    r"|tools?|functions?|calls?|thoughts?|rationales?|cot|system|instructions?|refusals?|preferences?|kto)(_|$)"
)
_MESSAGES = ("messages", "conversations", "conversation", "prompt", "completion")
_ALSO = frozenset(("images", "image", "videos", "video", "audios", "audio", "documents", "chat_template", "objects"))


def not_trained(item: dict[str, Any], rows: Sequence[dict[str, Any]], answers: Sequence[bool], within: str) -> set[int]:
    """Positions of answers that are only read.

    Args:
        item: the record.
        rows: its messages as they were given; {} for one that was not.
        answers: whether each is an assistant's.
        within: the field that holds the messages.

    Raises:
        ValueError: naming a mark that is neither one nor the other, or one that asks to train on other words.
    """
    flags = [_flag_of(row, f"{within}[{i}].") for i, row in enumerate(rows)]
    for name in _given(item, ""):
        value = item[name]
        if isinstance(value, list):
            flags = [
                _agree(flag, _flag(one, f"{name}[{i}]"), f"{name}[{i}]")
                for i, (flag, one) in enumerate(zip(flags, _one_each(value, name, answers), strict=True))
            ]
        elif not _flag(value, name):
            flags = [_agree(flag, False, name) if answer else flag for flag, answer in zip(flags, answers, strict=True)]
    for i, (flag, answer) in enumerate(zip(flags, answers, strict=True)):
        if flag and not answer:
            raise ValueError(f"message {i} of {within!r} is marked as one to train on, but only an assistant's are")
    return {i for i, (flag, answer) in enumerate(zip(flags, answers, strict=True)) if answer and flag is False}


def _one_each(values: list[Any], name: str, answers: Sequence[bool]) -> list[Any]:
    """A list with one value for each message, or for each answer."""
    if len(values) == len(answers):
        return values
    if len(values) == sum(answers):
        rest = iter(values)
        return [next(rest) if answer else None for answer in answers]
    raise ValueError(
        f"field {name!r} has {len(values)} values for {len(answers)} messages, {sum(answers)} of them an assistant's"
    )


def _given(item: dict[str, Any], within: str) -> list[str]:
    for name in _PARTS:
        if item.get(name):
            raise ValueError(f"field '{within}{name}' marks parts of an answer; an answer is trained on whole or not")
    nothing = (None,) if within else (None, "")  # the second is an empty cell of a table
    return [name for name in _MARKS if item.get(name) not in nothing]


def _flag_of(row: dict[str, Any], within: str) -> bool | None:
    flag = None
    for name in _given(row, within):
        flag = _agree(flag, _flag(row[name], f"{within}{name}"), f"{within}{name}")
    return flag


def _agree(one: bool | None, other: bool | None, name: str) -> bool | None:
    if one is not None and other is not None and one != other:
        raise ValueError(f"field {name!r} contradicts another mark of the same message")
    return one if other is None else other


def _flag(value: Any, name: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    raise ValueError(
        f"field {name!r} is {value!r}; an answer is trained on (1, true) or only read (0, false), nothing between"
    )


def lost_marks(columns: Iterable[str], read: Collection[str]) -> list[str]:
    """Columns that --columns leaves out though they look as if they told the trainer something."""
    left = [name for name in columns if isinstance(name, str) and name not in read]
    return [name for name in left if name in (*_MARKS, *_PARTS)] + unread_fields(dict.fromkeys(left, True), frozenset())


def unread_fields(item: Any, read: frozenset[str]) -> list[str]:
    """Fields of a record and its messages that look as if they told the trainer something, and are not read.

    Args:
        read: names of fields that are read.
    """
    if not isinstance(item, dict):
        return []
    names = [name for name, value in item.items() if value is not None]
    for field in _MESSAGES:
        rows = item.get(field)
        if isinstance(rows, list):
            names += [name for row in rows if isinstance(row, dict) for name, value in row.items() if value is not None]
    return [
        name
        for name in dict.fromkeys(names)
        if isinstance(name, str)
        and name not in read
        and name not in _MARKS
        and name not in _PARTS
        and (name.lower() in _ALSO or _ALIKE.search(name.lower()))
    ]
