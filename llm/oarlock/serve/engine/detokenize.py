"""Tokens to text as they come: whole characters only, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what decoders make of a part of a character


class Detokenizer:
    """The text of tokens, piece by piece; all pieces together are the text of all tokens.

    A token's text may hang on the one before it (a space that begins a text is dropped, a character may lie in several
    tokens), so that each is decoded behind those that were new before.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Of one answer.

        Args:
            decode: ids -> text.
        """
        self._decode = decode
        self._tokens: list[int] = []
        self._begin = self._end = 0  # of the tokens whose text was given last
        self._known = ""  # that text

    def add(self, token: int, hidden: bool = False) -> str:
        """The text that is new and certain; empty in the middle of a character.

        Args:
            hidden: a token without text, behind which no character goes on.
        """
        self._tokens.append(token)
        now = self._decode(self._tokens[self._begin :])
        if hidden and now.endswith(_BROKEN):
            return self.rest()
        if now.endswith(_BROKEN) or len(now) <= len(self._known):
            return ""
        new = now[len(self._known) :]
        self._begin, self._end = self._end, len(self._tokens)
        self._known = self._decode(self._tokens[self._begin :])
        return new

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        if self._end == len(self._tokens):
            return ""
        new = self._decode(self._tokens[self._begin :])[len(self._known) :]
        self._begin = self._end = len(self._tokens)
        self._known = ""
        return new


class StopFinder:
    """Finds the first stop text to be complete in a text that comes in pieces, however it is cut.

    Of several that are complete at the same character, the longest counts. Text of special tokens is hidden: stop
    texts are found in it too, but it is not shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Of one answer."""
        self._stops = tuple(stops)
        self._held: list[tuple[str, bool]] = []  # characters that may be the beginning of a stop text, and if hidden
        self.found = False

    def add(self, text: str, hidden: bool = False) -> str:
        """What may be shown: nothing that is, or may be the beginning of, a stop text, nor what follows one."""
        if self.found or not self._stops:
            return "" if self.found or hidden else text
        held = "".join(letter for letter, _ in self._held) + text
        self._held += [(letter, hidden) for letter in text]
        ends = [(place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._shown(min(ends)[1])
        longest = max(len(stop) for stop in self._stops) - 1
        keep = next(
            (n for n in range(min(longest, len(held)), 0, -1) if any(s.startswith(held[-n:]) for s in self._stops)), 0
        )
        return self._shown(len(held) - keep)

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._shown(len(self._held))

    def _shown(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return "".join(letter for letter, hidden in shown if not hidden)
