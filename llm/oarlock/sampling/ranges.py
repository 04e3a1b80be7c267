"""The values that a number may have, for checks, schemas and messages. Uses the standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
        least, most: inclusive bounds; None for no bound.
        words: the range in words; made from the bounds by default.
        excludes_least: whether `least` itself is outside.
        is_whole: whether only whole numbers are allowed.
    """

    least: float | None
    most: float | None
    words: str = ""
    excludes_least: bool = False
    is_whole: bool = False

    def __post_init__(self) -> None:
        if not self.words:
            object.__setattr__(self, "words", self._describe())

    def is_number(self, value: Any) -> bool:
        """Whether a value is a finite number of the right kind. A bool is not a number."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else (int, float)):
            return False
        return isinstance(value, int) or math.isfinite(value)

    def holds(self, value: float) -> bool:
        """Whether a number is inside the range."""
        least, most = self.least, self.most
        is_above = least is None or (value > least if self.excludes_least else value >= least)
        return is_above and (most is None or value <= most)

    def __call__(self, value: Any) -> str | None:
        """Return the problem of a value, or None, as the checks of config/options.py do."""
        return None if self.is_number(value) and self.holds(value) else f"must be {self.words}"

    def _describe(self) -> str:
        if self.most is None:
            return f"{'above' if self.excludes_least else 'at least'} {self.least:,}"
        if self.excludes_least:
            return f"above {self.least:,}, at most {self.most:,}"
        return f"from {self.least:,} to {self.most:,}"
