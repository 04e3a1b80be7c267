"""Ids and offsets of fine-tuning texts, by whatever tokenizer a folder has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oarlock.data.marked_encoding import TokenizedText
from oarlock.data.marked_text import MarkedText
from oarlock.data.tokenizers import batch_encode, encode_marked
from oarlock.environment import say_once

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
    if any(text.literal for text in texts):
        say_once(
            f"{type(tokenizer).__name__} does not tell text from special tokens: where records spell one, it is special"
        )
    stretches = [
        list(itertools.pairwise((0, *(cut for cut in places if 0 < cut < len(text.text)), len(text.text))))
        for text, places in zip(texts, cuts or [()] * len(texts), strict=True)
    ]
    rows = iter(
        batch_encode(tokenizer, [t.text[a:b] for t, parts in zip(texts, stretches, strict=True) for a, b in parts])
    )
    found = []
    for parts in stretches:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for span in parts:
            row = next(rows)
            ids += row
            offsets += [span] * len(row)
        found.append(TokenizedText(ids, offsets))
    return found
