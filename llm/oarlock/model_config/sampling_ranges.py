"""The ranges of sampling settings: one table for generation_config.json and for requests of every kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Of one number.

    Attributes:
        least, most: inclusive; None for no limit.
        is_open: without `least` itself.
        is_whole: whole numbers alone.
        words: what it may be, for people.
    """

    least: float | None
    most: float | None
    words: str
    is_open: bool = False
    is_whole: bool = False

    def is_number(self, value: Any) -> bool:
        """Whether it is a number of the kind: finite, no truth value."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else (int, float)):
            return False
        return isinstance(value, int) or math.isfinite(value)

    def holds(self, value: Any) -> bool:
        """Whether a number is inside."""
        least, most = self.least, self.most
        above = least is None or (value > least if self.is_open else value >= least)
        return above and (most is None or value <= most)


RANGES: dict[str, Range] = {
    "temperature": Range(0, 100, "from 0 to 100"),
    "top_p": Range(0, 1, "above 0, at most 1", is_open=True),
    "repetition_penalty": Range(0, 100, "above 0, at most 100", is_open=True),
    "frequency_penalty": Range(-100, 100, "from -100 to 100"),
    "presence_penalty": Range(-100, 100, "from -100 to 100"),
    "max_tokens": Range(1, None, "at least 1", is_whole=True),
    "default_tokens": Range(1, None, "at least 1", is_whole=True),
    "min_tokens": Range(0, None, "at least 0", is_whole=True),
    "top_k": Range(0, None, "at least 0 (0 for all)", is_whole=True),
    "seed": Range(-(2**63), 2**64 - 1, "a number of 64 bits", is_whole=True),
}
# OpenAI's own, where they are narrower.
OPENAI_RANGES: dict[str, Range] = RANGES | {
    "temperature": Range(0, 2, "from 0 to 2"),
    "frequency_penalty": Range(-2, 2, "from -2 to 2"),
    "presence_penalty": Range(-2, 2, "from -2 to 2"),
}
# A stop text is searched for at every token.
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS = 16, 256, 256
