"""Text in which a template's own text and users' content are distinguished."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from oarlock.errors import DataError

# Unicode's private-use planes 15 and 16. The last two code points of each plane are not characters.
_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class MarkedText:
    """A text whose ranges of users' content are marked.

    Attributes:
        text: the complete text, as the template renders it.
        literal: sorted, disjoint ranges [start, end) of characters in which the spelling of a special token is ordinary
            text. Outside of them, in the template's own text, special tokens are recognised.
    """

    text: str
    literal: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        end = 0
        for start, stop in self.literal:
            if not end <= start <= stop <= len(self.text):
                raise ValueError(
                    f"literal range [{start}, {stop}) is out of order or outside {len(self.text)} characters"
                )
            end = stop

    @classmethod
    def mark_all(cls, text: str) -> MarkedText:
        """Mark a complete text as users' content."""
        return cls(text, ((0, len(text)),) if text else ())


def find_private_characters(texts: Iterable[str]) -> set[str]:
    """Return the private-use characters (planes 15 and 16) in texts."""
    first = chr(_PRIVATE_USE[0].start)
    return {letter for text in texts if max(text, default="") >= first for letter in text if letter >= first}


def choose_private_characters(used: Collection[str], number: int) -> list[str]:
    """Choose `number` private-use characters that are not used.

    Raises:
        DataError: if there are not enough.
    """
    free = (chr(code) for codes in _PRIVATE_USE for code in codes if chr(code) not in used)
    found = list(itertools.islice(free, number))
    if len(found) < number:
        raise DataError("the text uses all private-use characters of Unicode, so special tokens can't be marked in it")
    return found
