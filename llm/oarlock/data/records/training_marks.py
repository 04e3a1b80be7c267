"""Marks in fine-tuning records that say which answers are trained on, as other trainers write them.

Marks of a message: OpenAI's weight, axolotl's train and training, ms-swift's loss, train_on_turn, loss_mask etc., as a
number, word or boolean. Marks of a record: the same names, for all its answers or as a list with a value per message.
An answer is trained on or not; fractional weights are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_MARKS = (
    *("weight", "train", "training", "trainable", "loss", "train_on_turn", "train_mask"),
    *("loss_mask", "loss_weight", "loss_scale"),
)
_PARTS = ("train_detail", "training_detail", "train_on_spans", "loss_spans")  # marks of parts of an answer
_WORDS = {
    **dict.fromkeys(("0", "0.0", "false", "no", "off", "n", "f"), False),
    **dict.fromkeys(("1", "1.0", "true", "yes", "on", "y", "t"), True),
}
# Fields that are not read here, but look relevant to training or to the model.
_RELEVANT = re.compile(
    r"(^|_)(train\w*|loss\w*|weights?|mask(ed)?|ignored?|skip(ped)?|labels?|targets?|rewards?|scores?|chosen|rejected"
    r"|tools?|functions?|calls?|thoughts?|rationales?|cot|system|instructions?|refusals?|preferences?|kto)(_|$)"
)
_MESSAGES = ("messages", "conversations", "conversation", "prompt", "completion")
_RELEVANT_NAMES = frozenset(
    ("images", "image", "videos", "video", "audios", "audio", "documents", "chat_template", "objects")
)


def find_untrained(
    item: dict[str, Any], rows: Sequence[dict[str, Any]], answers: Sequence[bool], within: str
) -> set[int]:
    """Return the indices of answers that are not trained on.

    Args:
        item: the record.
        rows: its messages as given; {} for added ones.
        answers: whether each is an assistant message.
        within: the field of the messages.

    Raises:
        ValueError: for a mark that is not yes or no, or one that asks to train on other messages.
    """
    flags: list[bool | None] = []
    for i, row in enumerate(rows):
        flag = None
        for name in _find_marks(row, f"{within}[{i}]."):
            flag = _agree(flag, _parse_flag(row[name], f"{within}[{i}].{name}"), f"{within}[{i}].{name}")
        flags.append(flag)
    for name in _find_marks(item, ""):
        value = item[name]
        if isinstance(value, list):
            flags = [
                _agree(flag, _parse_flag(one, f"{name}[{i}]"), f"{name}[{i}]")
                for i, (flag, one) in enumerate(zip(flags, _align_values(value, name, answers), strict=True))
            ]
        elif not _parse_flag(value, name):
            flags = [_agree(flag, False, name) if answer else flag for flag, answer in zip(flags, answers, strict=True)]
    for i, (flag, answer) in enumerate(zip(flags, answers, strict=True)):
        if flag and not answer:
            raise ValueError(f"message {i} of {within!r} is marked to be trained on, but is not an assistant message")
    return {i for i, (flag, answer) in enumerate(zip(flags, answers, strict=True)) if answer and flag is False}


def _align_values(values: list[Any], name: str, answers: Sequence[bool]) -> list[Any]:
    """Return one value per message of a list with one value per message or per answer."""
    if len(values) == len(answers):
        return values
    if len(values) == sum(answers):
        rest = iter(values)
        return [next(rest) if answer else None for answer in answers]
    raise ValueError(
        f"field {name!r} has {len(values)} values for {len(answers)} messages, of which {sum(answers)} are answers"
    )


def _find_marks(item: dict[str, Any], within: str) -> list[str]:
    for name in _PARTS:
        if item.get(name):
            raise ValueError(f"field '{within}{name}' marks parts of an answer; only complete answers can be marked")
    nothing = (None,) if within else (None, "")  # "" is an empty cell of a table
    return [name for name in _MARKS if item.get(name) not in nothing]


def _agree(one: bool | None, other: bool | None, name: str) -> bool | None:
    if one is not None and other is not None and one != other:
        raise ValueError(f"field {name!r} contradicts another mark of the same message")
    return one if other is None else other


def _parse_flag(value: Any, name: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    raise ValueError(
        f"field {name!r} is {value!r}; an answer is trained on (1, true) or not (0, false), no other value is supported"
    )


def find_lost_marks(columns: Iterable[str], read: Collection[str]) -> list[str]:
    """Return columns that --columns does not name, but that look relevant to training."""
    left = [name for name in columns if isinstance(name, str) and name not in read]
    return [name for name in left if name in (*_MARKS, *_PARTS)] + find_unread_fields(
        dict.fromkeys(left, True), frozenset()
    )


def find_unread_fields(item: Any, read: frozenset[str]) -> list[str]:
    """Return unread fields of a record and its messages that look relevant to training.

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
        and (name.lower() in _RELEVANT_NAMES or _RELEVANT.search(name.lower()))
    ]
