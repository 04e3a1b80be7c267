"""Encoding marked texts with PaddleNLP's tokenizers that can't be expressed as tokenizer.json (ChatGLM, GLM).

They return no offsets, so each token is searched for in the text, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from oarlock.data.examples.marked_encoding import TokenizedText
from oarlock.data.examples.marked_text import MarkedText


def list_slow_spellings(tokenizer: Any) -> tuple[str, ...]:
    """Return the spellings of the special tokens, longest first."""
    found = {str(token) for token in tokenizer.all_special_tokens}
    if hasattr(tokenizer, "encode_special_tokens"):  # ChatGLM 2 has special tokens besides PaddleNLP's
        found |= {*tokenizer.tokenizer.special_tokens, "</s>", "<unk>"}
    return tuple(sorted(found, key=lambda text: (-len(text), text)))


def compile_slow_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches the spellings of the special tokens."""
    return re.compile("|".join(map(re.escape, list_slow_spellings(tokenizer))) or r"(?!)")


def encode_slowly(tokenizer: Any, text: str, literal: bool) -> tuple[list[str], list[int]]:
    """Return the tokens and ids of a text.

    Args:
        literal: whether the spelling of a special token is text.
    """
    own = hasattr(tokenizer, "encode_special_tokens")
    if own:
        before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, not literal
    try:
        tokens = tokenizer.tokenize(text, split_special_tokens=True) if literal else tokenizer.tokenize(text)
    finally:
        if own:
            tokenizer.encode_special_tokens = before
    return [str(token) for token in tokens], list(tokenizer.convert_tokens_to_ids(tokens))


def encode_marked_slowly(tokenizer: Any, texts: Sequence[MarkedText]) -> list[TokenizedText]:
    """Return ids and offsets of texts. Only a text whose users' content spells a special token is split first."""
    pattern = compile_slow_pattern(tokenizer)
    return [_encode(tokenizer, text, pattern) for text in texts]


def _encode(tokenizer: Any, marked: MarkedText, pattern: re.Pattern[str]) -> TokenizedText:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end_of_part, literal in _split(marked, pattern):
        text = marked.text[start:end_of_part]
        tokens, found_ids = encode_slowly(tokenizer, text, literal)
        ids += found_ids
        place = waiting = 0
        for token in tokens:
            written = token if token in text else tokenizer.convert_tokens_to_string([token]).strip()
            found = text.find(written, place) if written else -1
            # Spaces belong to the token after them. A token that is part of a character is not found in the text: it
            # gets an empty range, and the next token may begin after the character.
            if found >= 0 and len(text[place:found].strip()) <= waiting:
                end, waiting = found + len(written), 0
            else:
                end, waiting = place, waiting + 1
            offsets.append((start + place, start + end))
            place = end
        if tokens and text[place:].isspace():
            offsets[-1] = (offsets[-1][0], end_of_part)
    return TokenizedText(ids, offsets)


def _split(marked: MarkedText, pattern: re.Pattern[str]) -> Iterator[tuple[int, int, bool]]:
    """Split a text at the literal ranges that spell a special token. Yields start, end, and whether it is literal."""
    done = 0
    for start, end in marked.literal:
        if pattern.search(marked.text, start, end):
            yield from [(done, start, False)] if start > done else []
            yield start, end, True
            done = end
    if done < len(marked.text):
        yield done, len(marked.text), False
