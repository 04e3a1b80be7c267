"""Ids and offsets of texts in which only a template's own special tokens are special.

The `tokenizers` library recognises special tokens either everywhere in a text or nowhere. Where users' words spell one,
a second tokenizer is used in which every special token has another spelling, a character of Unicode's private use that
the text does not hold. The template's own special tokens are respelled with it, the users' are left as they are: all
else, above all what a tokenizer does at the start of a text and beside a special token, stays as it was.
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

from oarlock.data.examples.marked_text import MarkedText, free_letters, private_letters
from oarlock.data.tokenizers.library_errors import ON_A_TEXT, library_errors
from oarlock.errors import DataError

_IN_WORDS = ("Nd", "Nl", "Pc")  # categories of digits, letter numbers and underscores


@dataclass(frozen=True)
class TokenizedText:
    """What a text became.

    Attributes:
        ids: [tokens].
        offsets: [tokens], the characters [start, end) of the text that each token stands for, in order: starts and
            ends never fall. The space that a token begins with is part of it. Tokens that are parts of one character
            have the same range; a token that stands for no character (a space put before a text) has an empty one.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class MarkedEncoder:
    """Encodes marked texts with a tokenizer of the `tokenizers` library.

    Args:
        backend: is copied, without its truncation, padding and post-processor (begin and end tokens).
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._source = backend.to_str()
        self._plain = _bare(self._source)
        self._plain.encode_special_tokens = backend.encode_special_tokens
        added: dict[int, AddedToken] = self._plain.get_added_tokens_decoder()
        self.spellings = special_spellings_of(added)
        unknown = json.loads(self._source)["model"].get("unk_token")
        self._special_ids = {id_ for id_, token in added.items() if token.special and token.content != unknown}
        self._special = {token.content for token in added.values() if token.special}
        # Tokens that are looked for before the text is normalised, then those that are looked for after.
        self._patterns = [
            _pattern([token for token in added.values() if token.normalized is normalized])
            for normalized in (False, True)
        ]
        self._single_words = {token.content for token in added.values() if token.single_word}
        self._respelled: _Respelled | None = None

    def encode(self, texts: Sequence[MarkedText]) -> list[TokenizedText]:
        """Ids and offsets of each, without begin and end tokens added."""
        with library_errors(ON_A_TEXT):
            encoded = self._plain.encode_batch([text.text for text in texts], add_special_tokens=False)
        rows = [_tokenized(row.ids, row.offsets) for row in encoded]
        spelled = [i for i, (text, row) in enumerate(zip(texts, rows, strict=True)) if self._spells(text, row)]
        if spelled:
            for i, row in zip(spelled, self._encode_spelled([texts[i] for i in spelled]), strict=True):
                rows[i] = row
        return rows

    def encode_documents(self, texts: Sequence[str], parse_special_tokens: bool) -> tuple[list[list[int]], list[bool]]:
        """Ids of texts that are users' from end to end, and whether each spells a special token.

        Args:
            parse_special_tokens: it becomes that token; else it is text.
        """
        with library_errors(ON_A_TEXT):
            rows = [row.ids for row in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        spelled = [not self._special_ids.isdisjoint(row) for row in rows]
        again = [] if parse_special_tokens else [i for i, found in enumerate(spelled) if found]
        if again:
            for i, row in zip(again, self._encode_spelled([MarkedText.of(texts[i]) for i in again]), strict=True):
                rows[i] = row.ids
        return rows, spelled

    def _spells(self, text: MarkedText, row: TokenizedText) -> bool:
        """Whether any of the users' words became a special token.

        Not only a spelling found in the text: normalisation and the merges of a vocabulary that lists its special
        tokens can make one too.
        """
        if not text.literal or self._special_ids.isdisjoint(row.ids):
            return False
        found = [span for id_, span in zip(row.ids, row.offsets, strict=True) if id_ in self._special_ids]
        return any(start < stop and end > begin for start, end in found for begin, stop in text.literal)

    def _encode_spelled(self, texts: Sequence[MarkedText]) -> list[TokenizedText]:
        respelled = self._respelling(texts)
        pieces = [self._respell(text, respelled.spelling) for text in texts]
        with library_errors(ON_A_TEXT):
            rows = respelled.backend.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        return [
            _tokenized(
                [respelled.ids.get(id_, id_) for id_ in row.ids],
                [(_place(places, start), _place(places, end)) for start, end in row.offsets],
            )
            for (_, places), row in zip(pieces, rows, strict=True)
        ]

    def _respelling(self, texts: Sequence[MarkedText]) -> _Respelled:
        """A respelling that none of the texts holds."""
        used = private_letters(text.text for text in texts)
        if self._respelled is None or used & self._respelled.letters:
            spelling = dict(zip(self.spellings, free_letters(used, len(self.spellings)), strict=True))
            self._respelled = _respell_tokenizer(self._source, self._plain, spelling)
        return self._respelled

    def _respell(self, marked: MarkedText, spelling: dict[str, str]) -> tuple[str, list[tuple[int, int]]]:
        """The text with the template's own special tokens respelled; (place there, place here) after each of them."""
        text, parts, places, done, length = marked.text, [], [(0, 0)], 0, 0
        for start, end in self._own(marked):
            parts += [text[done:start], spelling[text[start:end]]]
            length += start - done + 1
            places.append((length, end))
            done = end
        return "".join([*parts, text[done:]]), places

    def _own(self, marked: MarkedText) -> list[tuple[int, int]]:
        """Where the template's own special tokens stand, found as the library finds them: the leftmost and longest."""
        before, after = self._patterns
        found, done = [], 0
        for start, end, own in [
            *self._matches(marked, before, 0, len(marked.text)),
            (len(marked.text),) * 2 + (False,),
        ]:
            found += [(a, b) for a, b, special in self._matches(marked, after, done, start) if special]
            found += [(start, end)] if own else []
            done = end
        return found

    def _matches(
        self, marked: MarkedText, pattern: re.Pattern[str] | None, start: int, end: int
    ) -> Iterator[tuple[int, int, bool]]:
        """Added tokens in [start, end), and whether each is special; the spelling of one in users' words is none."""
        first = start
        while pattern and (match := pattern.search(marked.text, start, end)):
            special = match.group() in self._special
            if special and any(match.start() < stop and match.end() > begin for begin, stop in marked.literal):
                start = match.start() + 1
                continue
            start = match.end()
            before = marked.text[max(first, match.start() - 1) : match.start()]
            after = marked.text[match.end() : min(end, match.end() + 1)]
            if match.group() not in self._single_words or not (_in_word(before) or _in_word(after)):
                yield match.start(), match.end(), special


@dataclass(frozen=True)
class _Respelled:
    """A tokenizer with other spellings of its special tokens.

    Attributes:
        spelling: content of a special token -> the character in its place.
        letters: those characters.
        ids: its ids -> those of the tokenizer that it was made from, where they are not the same.
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
    # Where the vocabulary lists them too, no merge and no search of the vocabulary may find the old spelling.
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {spelling.get(piece, piece): id_ for piece, id_ in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[spelling.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in spelling:
        model["unk_token"] = spelling[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, spelling)]
    backend = _bare(json.dumps(content))
    ids = {}
    for id_, token in plain.get_added_tokens_decoder().items():
        there = backend.token_to_id(spelling[token.content] if token.special else token.content)
        if there is None:
            raise DataError(f"the special token {token.content!r} can't be told from text that spells it")
        if there != id_:
            ids[there] = id_
    return _Respelled(backend, spelling, frozenset(spelling.values()), ids)


def _makes(merge: str | list[str], spelling: dict[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in spelling or right in spelling or left + right in spelling


def _bare(source: str) -> Tokenizer:
    """A tokenizer that adds and cuts nothing, and whose offsets leave nothing out (post-processors trim spaces)."""
    content = json.loads(source)
    content.update(post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(content))


def _pattern(tokens: list[AddedToken]) -> re.Pattern[str] | None:
    ordered = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile("|".join(re.escape(token.content) for token in ordered)) if ordered else None


def _in_word(letter: str) -> bool:
    """Whether the library takes a character for a part of a word: \\w of Rust's regex (UTS 18), not of Python's."""
    return bool(letter) and (
        unicodedata.category(letter)[0] in "LM"
        or unicodedata.category(letter) in _IN_WORDS
        or letter in "\u200c\u200d"
        or "\u24b6" <= letter <= "\u24e9"
    )


def _tokenized(ids: list[int], offsets: Sequence[tuple[int, int]]) -> TokenizedText:
    """With offsets in order; normalisers that move characters leave them out of it."""
    starts, ends = [first for first, _ in offsets], [last for _, last in offsets]
    if starts == sorted(starts) and ends == sorted(ends):  # nearly always, and quickly seen
        return TokenizedText(ids, list(offsets))
    ordered, start, end = [], 0, 0
    for first, last in offsets:
        start, end = max(start, first), max(end, last)
        ordered.append((min(start, end), end))
    return TokenizedText(ids, ordered)


def _place(places: list[tuple[int, int]], there: int) -> int:
    there_from, here_from = places[bisect_right(places, (there, float("inf"))) - 1]
    return here_from + there - there_from


def special_spellings_of(added: dict[int, AddedToken]) -> tuple[str, ...]:
    """Contents of the special tokens among them, the longest first."""
    return tuple(
        sorted((token.content for token in added.values() if token.special), key=lambda text: (-len(text), text))
    )


_ENCODERS: WeakKeyDictionary[Any, tuple[int, MarkedEncoder]] = WeakKeyDictionary()


def marked_encoder(tokenizer: Any) -> MarkedEncoder:
    """That of a tokenizer with a backend of the `tokenizers` library; made again when tokens were added to it."""
    backend = tokenizer.backend_tokenizer
    size, encoder = _ENCODERS.get(tokenizer, (0, None))
    if encoder is None or size != backend.get_vocab_size(with_added_tokens=True):
        encoder = MarkedEncoder(backend)
        _ENCODERS[tokenizer] = (backend.get_vocab_size(with_added_tokens=True), encoder)
    return encoder
