"""Tokenizing fine-tuning texts with offsets, for any tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oarlock.data.examples.marked_encoding import TokenizedText
from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.tokenizers.load import encode_marked

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase


def tokenize(
    tokenizer: PretrainedTokenizerBase | Any, texts: Sequence[MarkedText], cuts: Sequence[Sequence[int]] = ()
) -> list[TokenizedText]:
    """Tokenize texts. Tokenizers without offsets (ChatGLM, GLM) get each text in segments.

    Args:
        cuts: for each text, the positions (characters) where it may be split.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        return encode_marked(tokenizer, texts)
    segments = [
        list(itertools.pairwise((0, *(cut for cut in places if 0 < cut < len(text.text)), len(text.text))))
        for text, places in zip(texts, cuts or [()] * len(texts), strict=True)
    ]
    marked = [_slice(text, *span) for text, parts in zip(texts, segments, strict=True) for span in parts]
    rows = iter(encode_marked(tokenizer, marked))
    found = []
    for parts in segments:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for first, last in parts:
            row = next(rows)
            ids += row.ids
            offsets += [(first, last)] * len(row.ids)
        found.append(TokenizedText(ids, offsets))
    return found


def _slice(text: MarkedText, first: int, last: int) -> MarkedText:
    literal = [(max(start, first) - first, min(end, last) - first) for start, end in text.literal]
    return MarkedText(text.text[first:last], tuple((start, end) for start, end in literal if start < end))
