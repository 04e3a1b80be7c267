"""Tokenizing texts in which only the template's own special tokens are special.

The `tokenizers` library recognises special tokens either everywhere in a text or nowhere. If users' content spells one,
a second tokenizer is used, in which each special token is spelled as a private-use character that is not in the text.
The template's own special tokens are respelled, users' content is not. Everything else stays the same, such as what a
tokenizer does at the start of a text or next to a special token.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer

from oarlock.data.examples.marked_text import MarkedText, choose_private_characters, find_private_characters
from oarlock.data.tokenizers.library_errors import ON_A_TEXT, convert_errors
from oarlock.errors import DataError

_IN_WORDS = ("Nd", "Nl", "Pc")  # Unicode categories of digits, letter numbers and underscores


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of a text.

    Attributes:
        ids: [tokens].
        offsets: the range of characters [start, end) of each token, [tokens]. Starts and ends never decrease. A token's
            range includes its leading space. Tokens that are parts of one character have the same range. A token
            without a character (a space added before a text) has an empty one.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class MarkedEncoder:
    """Encodes marked texts with a tokenizer of the `tokenizers` library.

    Args:
        backend: copied without truncation, padding and post-processor (begin and end tokens).
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._source = backend.to_str()
        self._plain = _load_bare(self._source)
        self._plain.encode_special_tokens = backend.encode_special_tokens
        added: dict[int, AddedToken] = self._plain.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        self.spellings = tuple(sorted(special, key=lambda text: (-len(text), text)))  # longest first
        unknown = json.loads(self._source)["model"].get("unk_token")
        self._special_ids = {id_ for id_, token in added.items() if token.special and token.content != unknown}
        self._special = special
        # Added tokens that the library finds before it normalises the text, then those that it finds after.
        self._patterns: list[re.Pattern[str] | None] = []
        for normalized in (False, True):
            contents = [token.content for token in added.values() if token.normalized is normalized]
            longest_first = sorted(contents, key=len, reverse=True)
            self._patterns.append(re.compile("|".join(map(re.escape, longest_first))) if contents else None)
        self._single_words = {token.content for token in added.values() if token.single_word}
        self._respelled: _Respelled | None = None

    def encode(self, texts: Sequence[MarkedText]) -> list[TokenizedText]:
        """Return ids and offsets of each text. No begin and end tokens are added."""
        with convert_errors(ON_A_TEXT):
            encoded = self._plain.encode_batch([text.text for text in texts], add_special_tokens=False)
        rows = [_sort_offsets(row.ids, row.offsets) for row in encoded]
        spelled = []  # texts in which users' content became a special token
        for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
            # The ids are searched, not the text: normalisation, and merges of a vocabulary that lists special tokens,
            # can produce one too.
            if text.literal and not self._special_ids.isdisjoint(row.ids):
                found = [span for id_, span in zip(row.ids, row.offsets, strict=True) if id_ in self._special_ids]
                if any(start < stop and end > begin for start, end in found for begin, stop in text.literal):
                    spelled.append(i)
        if spelled:
            for i, row in zip(spelled, self._encode_spelled([texts[i] for i in spelled]), strict=True):
                rows[i] = row
        return rows

    def encode_documents(self, texts: Sequence[str], parse_special_tokens: bool) -> tuple[list[list[int]], list[bool]]:
        """Return the ids of texts of users' content, and whether each spells a special token.

        Args:
            parse_special_tokens: whether such a spelling becomes the token, not text.
        """
        with convert_errors(ON_A_TEXT):
            rows = [row.ids for row in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        spelled = [not self._special_ids.isdisjoint(row) for row in rows]
        again = [] if parse_special_tokens else [i for i, found in enumerate(spelled) if found]
        if again:
            for i, row in zip(again, self._encode_spelled([MarkedText.mark_all(texts[i]) for i in again]), strict=True):
                rows[i] = row.ids
        return rows, spelled

    def _encode_spelled(self, texts: Sequence[MarkedText]) -> list[TokenizedText]:
        used = find_private_characters(text.text for text in texts)
        if self._respelled is None or used & self._respelled.letters:
            spelling = dict(zip(self.spellings, choose_private_characters(used, len(self.spellings)), strict=True))
            self._respelled = _respell_tokenizer(self._source, self._plain, spelling)
        respelled = self._respelled
        pieces = [self._respell(text, respelled.spelling) for text in texts]
        with convert_errors(ON_A_TEXT):
            rows = respelled.backend.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        return [
            _sort_offsets(
                [respelled.ids.get(id_, id_) for id_ in row.ids],
                [(_map_back(places, start), _map_back(places, end)) for start, end in row.offsets],
            )
            for (_, places), row in zip(pieces, rows, strict=True)
        ]

    def _respell(self, marked: MarkedText, spelling: dict[str, str]) -> tuple[str, list[tuple[int, int]]]:
        """Respell the template's special tokens. Returns the text, and (its position, source position) after each."""
        text, parts, places, done, length = marked.text, [], [(0, 0)], 0, 0
        for start, end in self._find_own_tokens(marked):
            parts += [text[done:start], spelling[text[start:end]]]
            length += start - done + 1
            places.append((length, end))
            done = end
        return "".join([*parts, text[done:]]), places

    def _find_own_tokens(self, marked: MarkedText) -> list[tuple[int, int]]:
        """Find the template's own special tokens as the library does: leftmost first, then longest."""
        before, after = self._patterns
        found, done = [], 0
        for start, end, own in [
            *self._iterate_matches(marked, before, 0, len(marked.text)),
            (len(marked.text),) * 2 + (False,),
        ]:
            found += [(a, b) for a, b, special in self._iterate_matches(marked, after, done, start) if special]
            found += [(start, end)] if own else []
            done = end
        return found

    def _iterate_matches(
        self, marked: MarkedText, pattern: re.Pattern[str] | None, start: int, end: int
    ) -> Iterator[tuple[int, int, bool]]:
        """Yield the added tokens in [start, end), and whether each is special. Users' spellings are skipped."""
        first = start
        while pattern and (match := pattern.search(marked.text, start, end)):
            special = match.group() in self._special
            if special and any(match.start() < stop and match.end() > begin for begin, stop in marked.literal):
                start = match.start() + 1
                continue
            start = match.end()
            before = marked.text[max(first, match.start() - 1) : match.start()]
            after = marked.text[match.end() : min(end, match.end() + 1)]
            if match.group() not in self._single_words or not (_is_in_word(before) or _is_in_word(after)):
                yield match.start(), match.end(), special


@dataclass(frozen=True)
class _Respelled:
    """A tokenizer whose special tokens are respelled.

    Attributes:
        spelling: the new spelling, a character, by content of the special token.
        letters: these characters.
        ids: the original tokenizer's id by id of this one, where they differ.
    """

    backend: Tokenizer
    spelling: dict[str, str]
    letters: frozenset[str]
    ids: dict[int, int]


def _respell_tokenizer(source: str, plain: Tokenizer, spelling: dict[str, str]) -> _Respelled:
    content = json.loads(source)
    model = content["model"]
    for token in content["added_tokens"]:
        token["content"] = spelling.get(token["content"], token["content"]) if token["special"] else token["content"]
    # If the vocabulary lists them too, neither a merge nor a vocabulary lookup may produce the old spelling.
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {spelling.get(piece, piece): id_ for piece, id_ in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[spelling.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in spelling:
        model["unk_token"] = spelling[model["unk_token"]]
    if "merges" in model:
        pairs = ((merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, (a, b) in pairs if spelling.keys().isdisjoint((a, b, a + b))]
    backend = _load_bare(json.dumps(content))
    ids = {}
    for id_, token in plain.get_added_tokens_decoder().items():
        there = backend.token_to_id(spelling[token.content] if token.special else token.content)
        if there is None:
            raise DataError(f"the special token {token.content!r} can't be distinguished from text that spells it")
        if there != id_:
            ids[there] = id_
    return _Respelled(backend, spelling, frozenset(spelling.values()), ids)


def _load_bare(source: str) -> Tokenizer:
    """Load a tokenizer without post-processor, truncation and padding. Post-processors also trim spaces off offsets."""
    content = json.loads(source)
    content.update(post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(content))


def _is_in_word(letter: str) -> bool:
    """Whether a character is part of a word for the library: \\w of Rust's regex (UTS 18), not of Python's."""
    return bool(letter) and (
        unicodedata.category(letter)[0] in "LM"
        or unicodedata.category(letter) in _IN_WORDS
        or letter in "\u200c\u200d"
        or "\u24b6" <= letter <= "\u24e9"
    )


def _sort_offsets(ids: list[int], offsets: Sequence[tuple[int, int]]) -> TokenizedText:
    """Put offsets in order. They are out of order after a normaliser that moves characters."""
    starts, ends = [first for first, _ in offsets], [last for _, last in offsets]
    if starts == sorted(starts) and ends == sorted(ends):  # the usual case
        return TokenizedText(ids, list(offsets))
    ordered, start, end = [], 0, 0
    for first, last in offsets:
        start, end = max(start, first), max(end, last)
        ordered.append((min(start, end), end))
    return TokenizedText(ids, ordered)


def _map_back(places: list[tuple[int, int]], position: int) -> int:
    respelled, source = places[bisect_right(places, (position, float("inf"))) - 1]
    return source + position - respelled


_ENCODERS: WeakKeyDictionary[Any, tuple[int, MarkedEncoder]] = WeakKeyDictionary()


def get_marked_encoder(tokenizer: Any) -> MarkedEncoder:
    """Return the cached encoder of a tokenizer with a backend of the `tokenizers` library.

    It is made again after tokens were added.
    """
    backend = tokenizer.backend_tokenizer
    size, encoder = _ENCODERS.get(tokenizer, (0, None))
    if encoder is None or size != backend.get_vocab_size(with_added_tokens=True):
        encoder = MarkedEncoder(backend)
        _ENCODERS[tokenizer] = (backend.get_vocab_size(with_added_tokens=True), encoder)
    return encoder
