"""A tokenizer is tried on a few texts when it is read, so that what is wrong with it is known before anything else."""

from __future__ import annotations

from oarlock.data.tokenizers.fast_tokenizer import FastTokenizer
from oarlock.errors import ModelError

# Runs of one character are what patterns that match in too many ways fail at (the library gives up after a while).
_TRIED = (
    "a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! 111111111111111111111111111111.\n",
    "a              \u00e9\t\U0001f600 .",
)


def try_tokenizer(tokenizer: FastTokenizer) -> None:
    """Encode a few texts, so that what is wrong with a tokenizer is known when it is read.

    Raises:
        ModelError: for ids that no token has. What the library raises.
    """
    size = len(tokenizer)
    for text in _TRIED:
        try:
            ids = tokenizer.backend_tokenizer.encode(text).ids
            tokenizer.backend_tokenizer.decode(ids)
        except Exception:  # a character that is not in a vocabulary without an unknown token: of the text, not of it
            if text == _TRIED[0]:
                raise
            continue
        odd = next((id_ for id_ in ids if id_ >= size), None)
        if odd is not None:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer makes the id {odd:,}, which no token has")
