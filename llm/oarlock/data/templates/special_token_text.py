"""Telling special tokens that user text spells from those that the template writes.

Before a template runs, each spelling in user text is replaced by a character of Unicode's private use area. These
characters survive what a template does with text (strip, split, replace). Afterwards the spellings are restored and
their positions noted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from oarlock.data.examples.marked_text import MarkedText, choose_private_characters, find_private_characters


@lru_cache(maxsize=16)
def compile_spellings(spellings: tuple[str, ...]) -> re.Pattern[str]:
    """Compile a pattern that finds any of the spellings, longest first."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or "(?!)")


def replace_text(value: Any, replace: Callable[[str], str]) -> Any:
    """Apply a function to each text in a value, keys included."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {replace_text(key, replace): replace_text(inner, replace) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_text(inner, replace) for inner in value]
    return value


class Words:
    """User text, and the placeholders in it.

    Args:
        values: everything that users wrote (messages, tools, ...).
        spellings: of special tokens, to be treated as text.
        source: of the template.

    Attributes:
        size: number of characters of all texts in the values.
        spelled: number of special tokens that they spell.
    """

    def __init__(self, values: Any, spellings: tuple[str, ...], source: str) -> None:
        self._pattern = compile_spellings(spellings)
        texts: list[str] = []
        replace_text(values, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
        self.size = sum(map(len, texts))
        self.spelled = sum(len(self._pattern.findall(text)) for text in texts) if spellings else 0
        self._letters: dict[str, str] = {}
        if self.spelled:
            self._letters = dict(
                zip(
                    spellings,
                    choose_private_characters(find_private_characters([source, *texts]), len(spellings)),
                    strict=True,
                )
            )
        self._spellings = {letter: spelling for spelling, letter in self._letters.items()}
        self._shown = re.compile(f"[{''.join(self._spellings)}]") if self._spellings else re.compile("(?!)")

    def hide(self, value: Any) -> Any:
        """Replace special tokens in a value by placeholders."""
        return replace_text(value, self.hide_in) if self._letters else value

    def hide_in(self, text: str) -> str:
        """Replace special tokens in a text by placeholders."""
        return self._pattern.sub(lambda found: self._letters[found.group()], text) if self._letters else text

    def show(self, value: Any) -> Any:
        """Replace placeholders in a value by the spellings."""
        if not self._letters:
            return value
        spellings = self._spellings
        return replace_text(value, lambda text: self._shown.sub(lambda found: spellings[found.group()], text))

    def reveal(self, text: str, places: Sequence[int] = ()) -> tuple[MarkedText, list[int]]:
        """Replace placeholders in a rendered text. Returns it with the positions given, moved accordingly."""
        if not self._letters:
            return MarkedText(text), list(places)
        parts, literal, steps, done, length = [], [], [], 0, 0
        for found in self._shown.finditer(text):
            spelling = self._spellings[found.group()]
            parts += [text[done : found.start()], spelling]
            start = length + found.start() - done
            done, length = found.end(), start + len(spelling)
            literal.append((start, length))
            steps.append((done, length - done))
        parts.append(text[done:])
        moved = [place + max((shift for end, shift in steps if end <= place), default=0) for place in places]
        return MarkedText("".join(parts), tuple(literal)), moved
