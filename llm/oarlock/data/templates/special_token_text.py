"""Special tokens that users' words spell: kept apart from a template's own while it makes one text of all.

Before a template runs, each spelling in users' words is replaced by one character of Unicode's private use, which
survives whatever a template does with a text (strip, split, replace); afterwards it is put back, and its place noted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from oarlock.data.examples.marked_text import MarkedText, choose_private_characters, find_private_characters


@lru_cache(maxsize=16)
def spelling_pattern(spellings: tuple[str, ...]) -> re.Pattern[str]:
    """Finds any of them, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or "(?!)")


def replace_text(value: Any, replace: Callable[[str], str]) -> Any:
    """A value with each text in it, keys too, replaced."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {replace_text(key, replace): replace_text(inner, replace) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_text(inner, replace) for inner in value]
    return value


class Words:
    """Users' words, and the placeholders in them.

    Args:
        values: all that users wrote (messages, tools, ...).
        spellings: of special tokens, which are text there.
        source: of the template.

    Attributes:
        size: characters of all texts among the values.
        spelled: how many special tokens they spell.
    """

    def __init__(self, values: Any, spellings: tuple[str, ...], source: str) -> None:
        self._pattern = spelling_pattern(spellings)
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
        """A value with placeholders for the special tokens that it spells."""
        return replace_text(value, self.hide_in) if self._letters else value

    def hide_in(self, text: str) -> str:
        """The same for one text."""
        return self._pattern.sub(lambda found: self._letters[found.group()], text) if self._letters else text

    def show(self, value: Any) -> Any:
        """A value with the spellings in their places again."""
        return replace_text(value, self._show_in) if self._letters else value

    def _show_in(self, text: str) -> str:
        return self._shown.sub(lambda found: self._spellings[found.group()], text)

    def reveal(self, text: str, places: Sequence[int] = ()) -> tuple[MarkedText, list[int]]:
        """A text with placeholders as it is read, and where these places of it are there."""
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
