"""Text in which a template's own words and the words of users are told apart."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from oarlock.errors import DataError

# Private-use characters: planes 15 and 16, without their last two code points each, which are no characters.
_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class MarkedText:
    """A text, and where it is users' content.

    Attributes:
        text: the whole text, as a template renders it.
        literal: ranges [start, end) of characters, in order and apart, in which the spelling of a special token is
            ordinary text. Elsewhere, in the template's own words, special tokens are recognised.
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
    def of(cls, text: str) -> MarkedText:
        """A text that is users' content from end to end."""
        return cls(text, ((0, len(text)),) if text else ())


def private_letters(texts: Iterable[str]) -> set[str]:
    """The characters of Unicode's private use (planes 15 and 16) that texts hold."""
    first = chr(_PRIVATE_USE[0].start)
    return {letter for text in texts if max(text, default="") >= first for letter in text if letter >= first}


def free_letters(used: Collection[str], number: int) -> list[str]:
    """So many characters of Unicode's private use that are not used.

    Raises:
        DataError: when there are fewer.
    """
    free = (chr(code) for codes in _PRIVATE_USE for code in codes if chr(code) not in used)
    found = list(itertools.islice(free, number))
    if len(found) < number:
        raise DataError("the text holds every character of Unicode's private use, which can't be right")
    return found
