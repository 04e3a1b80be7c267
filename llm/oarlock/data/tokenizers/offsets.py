"""Ids and offsets of fine-tuning texts, by whatever tokenizer a folder has."""

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
    """Each text as a whole, where the tokenizer tells offsets; else (ChatGLM, GLM) cut into stretches.

    Args:
        cuts: for each text, the characters where it may be cut.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        return encode_marked(tokenizer, texts)
    stretches = [
        list(itertools.pairwise((0, *(cut for cut in places if 0 < cut < len(text.text)), len(text.text))))
        for text, places in zip(texts, cuts or [()] * len(texts), strict=True)
    ]
    marked = [_part(text, *span) for text, parts in zip(texts, stretches, strict=True) for span in parts]
    rows = iter(encode_marked(tokenizer, marked))
    found = []
    for parts in stretches:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for first, last in parts:
            row = next(rows)
            ids += row.ids
            offsets += [(first, last)] * len(row.ids)
        found.append(TokenizedText(ids, offsets))
    return found


def _part(text: MarkedText, first: int, last: int) -> MarkedText:
    literal = [(max(start, first) - first, min(end, last) - first) for start, end in text.literal]
    return MarkedText(text.text[first:last], tuple((start, end) for start, end in literal if start < end))
