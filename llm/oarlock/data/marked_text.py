"""Text in which a template's own words and the words of users are told apart."""

from __future__ import annotations

from dataclasses import dataclass


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
