"""Splitting a long text into chunks whose ids, concatenated, are those of the text.

A tokenizer without a pre-tokenizer needs more than linear time for one long string, and a text may not fit in memory.
Where a text may be split depends on the tokenizer: one merges line ends into the punctuation before them, another adds
a space before each text. So the tokenizer is tried out: a position is used if the text around it, CONTEXT characters on
both sides, gets the same ids with and without the split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Encode = Callable[[Sequence[str]], "Sequence[Sequence[int] | np.ndarray]"]

CHUNK_LENGTH = 1 << 16  # characters; longer texts are split
CONTEXT = 256  # characters on each side of a position that are tokenized to test it
# A text without such a position is split after this many characters anyway, and counted.
MAX_CHUNK_LENGTH = 1 << 22
_MAX_TRIED = 24  # positions of one kind that are tried in a range

# Kinds of positions: (pattern of the two characters around it, characters dropped). One kind is for tokenizers that
# add a space before each text: the space between two words is dropped, and added again.
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
class TextSplitter:
    """Splits texts for one tokenizer.

    Args:
        encode: texts -> ids of each.

    Attributes:
        unsure: number of splits where the ids may differ from those of the unsplit text.
    """

    encode: Encode
    unsure: int = 0
    _order: list[int] = field(default_factory=lambda: list(range(len(_KINDS))))

    def split_text(self, text: str) -> list[str]:
        """Split a complete text into chunks of about CHUNK_LENGTH characters."""
        parts, start = [], 0
        while len(text) - start > CHUNK_LENGTH + CONTEXT:
            end, start_of_next = self._find_chunk_end(text, start)
            parts.append(text[start:end])
            start = start_of_next
        rest = text[start:]
        return [*parts, rest] if rest or not parts else parts

    def split_start(self, text: str, at_least: int) -> tuple[str, str]:
        """Split the start of a text, of at least `at_least` characters, from the rest, which is not empty.

        Returns ("", text) if more of the text is needed to find a position.
        """
        last = len(text) - CONTEXT
        found = self._find_position(text, at_least, last) if last > at_least else None
        if found is None and len(text) > MAX_CHUNK_LENGTH + at_least:
            self.unsure += 1
            found = last, last
        return (text[: found[0]], text[found[1] :]) if found else ("", text)

    def _find_chunk_end(self, text: str, start: int) -> tuple[int, int]:
        low = start + CHUNK_LENGTH // 2
        high = start + CHUNK_LENGTH
        while True:
            high = min(high, len(text) - 1)
            if found := self._find_position(text, low, high):
                return found
            if high == len(text) - 1 or high - start >= MAX_CHUNK_LENGTH:
                break
            low, high = high, start + 2 * (high - start)
        if high == len(text) - 1 and high - start < MAX_CHUNK_LENGTH:
            return len(text), len(text)
        self.unsure += 1
        return high, high

    def _find_position(self, text: str, low: int, high: int) -> tuple[int, int] | None:
        """Return the last safe position in [low, high]: (end, start of the next chunk)."""
        for kind in self._order:
            pattern, left_out = _KINDS[kind]
            for end in _find_last_matches(pattern, text, max(low, 1), high):
                if self._is_safe(text, end, end + left_out):
                    self._order.remove(kind)
                    self._order.insert(0, kind)
                    return end, end + left_out
        return None

    def _is_safe(self, text: str, end: int, start: int) -> bool:
        # Tested with two contexts without a common period: some tokenizers split a long run of digits in groups of
        # three, and with one context a group could end at the position by chance.
        for context in (CONTEXT, CONTEXT // 2 - 1):
            left, right = text[max(0, end - context) : end], text[start : start + context]
            whole, *parts = self.encode([left + text[end:start] + right, left, right])
            if not np.array_equal(whole, np.concatenate([np.asarray(part) for part in parts])):
                return False
        return True


def _find_last_matches(pattern: re.Pattern[str], text: str, low: int, high: int) -> Iterator[int]:
    """Yield the starts of the last matches in [low, high], last one first."""
    given, step = 0, 512
    while high > low and given < _MAX_TRIED:
        begin = max(low, high - step)
        # The pattern looks at characters around the range: search from `begin` without an end, and stop at `high`.
        places = []
        for match in pattern.finditer(text, begin, min(len(text), high + 2)):
            if match.start() > high:
                break
            places.append(match.start())
        for place in reversed(places[-_MAX_TRIED:]):
            yield place
            given += 1
        high, step = begin - 1, step * 4
