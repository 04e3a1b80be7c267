"""Marked texts for the tokenizers of PaddleNLP that no tokenizer.json expresses (ChatGLM, GLM).

They give no offsets. Tokens are found in the text in turn by how they are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from oarlock.data.examples.marked_encoding import TokenizedText
from oarlock.data.examples.marked_text import MarkedText


def slow_spellings(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens as they are written, the longest first."""
    found = {str(token) for token in tokenizer.all_special_tokens}
    if hasattr(tokenizer, "encode_special_tokens"):  # ChatGLM 2 keeps its own beside PaddleNLP's
        found |= {*tokenizer.tokenizer.special_tokens, "</s>", "<unk>"}
    return tuple(sorted(found, key=lambda text: (-len(text), text)))


def slow_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Where a text spells a special token."""
    return re.compile("|".join(map(re.escape, slow_spellings(tokenizer))) or r"(?!)")


def slow_ids(tokenizer: Any, text: str, literal: bool) -> tuple[list[str], list[int]]:
    """Tokens and ids of a text.

    Args:
        literal: the spelling of a special token is text.
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
    """Ids and offsets of texts; only a text in which users spell a special token is tokenised in several stretches."""
    pattern = slow_pattern(tokenizer)
    return [_encode(tokenizer, text, pattern) for text in texts]


def _encode(tokenizer: Any, marked: MarkedText, pattern: re.Pattern[str]) -> TokenizedText:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end_of_stretch, literal in _stretches(marked, pattern):
        text = marked.text[start:end_of_stretch]
        tokens, found_ids = slow_ids(tokenizer, text, literal)
        ids += found_ids
        place = waiting = 0
        for token in tokens:
            written = token if token in text else tokenizer.convert_tokens_to_string([token]).strip()
            found = text.find(written, place) if written else -1
            # Spaces go with the token behind them. A part of a character is found nowhere: it has no width, and what
            # follows may begin after the character.
            if found >= 0 and len(text[place:found].strip()) <= waiting:
                end, waiting = found + len(written), 0
            else:
                end, waiting = place, waiting + 1
            offsets.append((start + place, start + end))
            place = end
        if tokens and text[place:].isspace():
            offsets[-1] = (offsets[-1][0], end_of_stretch)
    return TokenizedText(ids, offsets)


def _stretches(marked: MarkedText, pattern: re.Pattern[str]) -> Iterator[tuple[int, int, bool]]:
    """The whole text, or, where a literal range spells a special token, that range by itself and what is around it."""
    done = 0
    for start, end in marked.literal:
        if pattern.search(marked.text, start, end):
            yield from [(done, start, False)] if start > done else []
            yield start, end, True
            done = end
    if done < len(marked.text):
        yield done, len(marked.text), False
