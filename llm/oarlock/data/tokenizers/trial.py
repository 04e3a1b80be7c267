"""Trying out a tokenizer on a few texts when it is read, so that errors are found early."""

from __future__ import annotations

from oarlock.data.tokenizers.fast_tokenizer import FastTokenizer
from oarlock.errors import ModelError

# Long runs of one character make patterns with too many matches fail (the library gives up after a while).
_TEXTS = (
    "a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! 111111111111111111111111111111.\n",
    "a              \u00e9\t\U0001f600 .",
)


def try_tokenizer(tokenizer: FastTokenizer) -> None:
    """Encode a few texts.

    Raises:
        ModelError: for ids without a token.
        Exception: any error of the library.
    """
    size = len(tokenizer)
    for text in _TEXTS:
        try:
            ids = tokenizer.backend_tokenizer.encode(text).ids
            tokenizer.backend_tokenizer.decode(ids)
        except Exception:  # maybe a character outside a vocabulary without an unknown token, which is not an error
            if text == _TEXTS[0]:
                raise
            continue
        odd = next((id_ for id_ in ids if id_ >= size), None)
        if odd is not None:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer produces the id {odd:,}, which has no token")
