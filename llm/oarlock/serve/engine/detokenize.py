"""Tokens to text as they come: whole characters only, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what decoders make of a part of a character


class Detokenizer:
    """The text of an answer's tokens, part by part. All parts together are the text of all tokens.

    A token's text may depend on the token before it: a space that begins a text is dropped, and a character may span
    several tokens. So each token is decoded together with those that were new before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Start an answer; `decode` makes text of token ids."""
        self._decode = decode
        self._tokens: list[int] = []
        self._begin = self._end = 0  # of the tokens whose text was returned last
        self._last_text = ""

    def add(self, token: int, hidden: bool = False) -> str:
        """The text that is new and certain; empty inside of a character.

        Args:
            hidden: the token has no text, and no character spans it.
        """
        self._tokens.append(token)
        text = self._decode(self._tokens[self._begin :])
        if hidden and text.endswith(_BROKEN):
            return self.flush()
        if text.endswith(_BROKEN) or len(text) <= len(self._last_text):
            return ""
        new = text[len(self._last_text) :]
        self._begin, self._end = self._end, len(self._tokens)
        self._last_text = self._decode(self._tokens[self._begin :])
        return new

    def flush(self) -> str:
        """The text that was held back, at the end of the answer."""
        if self._end == len(self._tokens):
            return ""
        new = self._decode(self._tokens[self._begin :])[len(self._last_text) :]
        self._begin = self._end = len(self._tokens)
        self._last_text = ""
        return new


class StopFinder:
    """Finds the first stop text that is complete, in a text that comes in parts, wherever it is cut.

    Of several that are complete at the same character, the longest counts. The text of special tokens is hidden: stop
    texts are found in it too, but it is not shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Start an answer."""
        self._stops = tuple(stops)
        self._held: list[tuple[str, bool]] = []  # characters that may be the beginning of a stop text, and if hidden
        self.found = False

    def add(self, text: str, hidden: bool = False) -> str:
        """The text to show: without what is, or may be the beginning of, a stop text, and without what follows one."""
        if self.found or not self._stops:
            return "" if self.found or hidden else text
        held = "".join(letter for letter, _ in self._held) + text
        self._held += [(letter, hidden) for letter in text]
        ends = [(start + len(stop), start) for stop in self._stops if (start := held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._release(min(ends)[1])
        longest = max(len(stop) for stop in self._stops) - 1
        keep = next(
            (n for n in range(min(longest, len(held)), 0, -1) if any(s.startswith(held[-n:]) for s in self._stops)), 0
        )
        return self._release(len(held) - keep)

    def flush(self) -> str:
        """The text that was held back, when no more comes."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        return "".join(letter for letter, hidden in released if not hidden)
