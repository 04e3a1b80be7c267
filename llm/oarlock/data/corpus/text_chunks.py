"""A long text in pieces whose ids, put together, are those of the whole.

A tokenizer without a pre-tokenizer takes more than linear time on one long string, and a text may be larger than the
memory. Where a text may be cut depends on the tokenizer: one absorbs line ends into the punctuation before them,
another puts a space before every text it is given. So the tokenizer is asked: a place is taken where the ids of the
text around it, CONTEXT characters on both sides, are the same with the cut and without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Encode = Callable[[Sequence[str]], "Sequence[Sequence[int] | np.ndarray]"]

PIECE = 1 << 16  # characters; a text is cut when it has more
CONTEXT = 256  # characters on each side that the tokenizer is asked about
# A text without any such place is cut between two characters after this many, which is counted.
LONGEST_PIECE = 1 << 22
_ASKED = 24  # places of one kind that are tried in a stretch

# Kinds of places, as (pattern of the two characters around it, characters left out). The last kind is for tokenizers
# that put a space before every text: the space between two words is left out and comes back.
_KINDS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"(?<=\w)(?=\n)"), 0),
    (re.compile(r"(?<=\w)(?=\s)"), 0),
    (re.compile(r"(?<=\S)(?=\s)"), 0),
    (re.compile(r"(?<=\S) (?=\S)"), 1),
    (re.compile(r"(?<=\s)(?=\S)"), 0),
    (re.compile(r"(?<=\w)(?=[^\w\s])|(?<=[^\w\s])(?=\w)"), 0),
    (re.compile(r"(?<=\w)(?=\w)", re.DOTALL), 0),
)


@dataclass
class Cutter:
    """Cuts texts for one tokenizer.

    Args:
        encode: texts -> ids of each.

    Attributes:
        unsure: places where a text was cut although the ids of the whole may be others there.
    """

    encode: Encode
    unsure: int = 0
    _order: list[int] = field(default_factory=lambda: list(range(len(_KINDS))))

    def pieces(self, text: str) -> list[str]:
        """A whole text in pieces of about PIECE characters."""
        parts, start = [], 0
        while len(text) - start > PIECE + CONTEXT:
            end, start_of_next = self._end_of_piece(text, start)
            parts.append(text[start:end])
            start = start_of_next
        rest = text[start:]
        return [*parts, rest] if rest or not parts else parts

    def split(self, text: str, at_least: int) -> tuple[str, str]:
        """The beginning of a text that goes on, at least so long, and the rest, which is not empty.

        ("", text) where more of the text is needed to find a place.
        """
        last = len(text) - CONTEXT
        found = self._place(text, at_least, last) if last > at_least else None
        if found is None and len(text) > LONGEST_PIECE + at_least:
            self.unsure += 1
            found = last, last
        return (text[: found[0]], text[found[1] :]) if found else ("", text)

    def _end_of_piece(self, text: str, start: int) -> tuple[int, int]:
        low = start + PIECE // 2
        high = start + PIECE
        while True:
            high = min(high, len(text) - 1)
            if found := self._place(text, low, high):
                return found
            if high == len(text) - 1 or high - start >= LONGEST_PIECE:
                break
            low, high = high, start + 2 * (high - start)
        if high == len(text) - 1 and high - start < LONGEST_PIECE:
            return len(text), len(text)
        self.unsure += 1
        return high, high

    def _place(self, text: str, low: int, high: int) -> tuple[int, int] | None:
        """The last place in [low, high] that is known to change nothing: (end, start of what follows)."""
        for kind in self._order:
            pattern, left_out = _KINDS[kind]
            for end in _last_matches(pattern, text, max(low, 1), high):
                if self._changes_nothing(text, end, end + left_out):
                    self._order.remove(kind)
                    self._order.insert(0, kind)
                    return end, end + left_out
        return None

    def _changes_nothing(self, text: str, end: int, start: int) -> bool:
        # Asked twice, from places that have no period in common: in a long run of digits, which some tokenizers take in
        # groups of three, a group ends at the cut as seen from one of them only by chance.
        for context in (CONTEXT, CONTEXT // 2 - 1):
            left, right = text[max(0, end - context) : end], text[start : start + context]
            whole, *parts = self.encode([left + text[end:start] + right, left, right])
            if not np.array_equal(whole, np.concatenate([np.asarray(part) for part in parts])):
                return False
        return True


def _last_matches(pattern: re.Pattern[str], text: str, low: int, high: int) -> Iterator[int]:
    """Starts of the last matches in [low, high], the last one first."""
    given, step = 0, 512
    while high > low and given < _ASKED:
        begin = max(low, high - step)
        # The pattern sees the characters around the stretch: search from `begin` with no end, stop at `high`.
        places = []
        for match in pattern.finditer(text, begin, min(len(text), high + 2)):
            if match.start() > high:
                break
            places.append(match.start())
        for place in reversed(places[-_ASKED:]):
            yield place
            given += 1
        high, step = begin - 1, step * 4
