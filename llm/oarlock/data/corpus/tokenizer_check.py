"""Checking that a corpus was made with the tokenizer of a run. Wrong ids can be in range, and mean other text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.data.corpus.notes import read_corpus_summary
from oarlock.data.tokenizers.fast_tokenizer import FastTokenizer
from oarlock.data.tokenizers.fingerprint import compute_ids_fingerprint, is_comparable
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.environment.console import log_once
from oarlock.errors import DataError, OarlockError

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase


def check_corpus_tokenizers(
    prefixes: Sequence[str], tokenizer: FastTokenizer | PretrainedTokenizerBase, name: str, allow_other: bool = False
) -> None:
    """Refuse corpora of another tokenizer.

    A corpus without a recorded fingerprint is accepted, with a log line. One with a fingerprint of an earlier version
    is refused only if its tokenizer can still be found and is another one.

    Args:
        prefixes: of the corpora.
        name: of the tokenizer, for messages.
        allow_other: log a difference instead of refusing it.

    Raises:
        DataError: with the names of both tokenizers.
    """
    own = compute_ids_fingerprint(tokenizer)
    for prefix in prefixes:
        notes = read_corpus_summary(prefix)
        theirs, made_with = str(notes.get("tokenizer_fingerprint") or ""), str(notes.get("tokenizer") or "")
        if not theirs:
            log_once(f"{prefix}: its tokenizer is not recorded in {prefix}.json; assuming that it is {name}")
            continue
        if not is_comparable(theirs):
            if theirs in _compute_earlier_fingerprints(tokenizer, name):
                continue
            theirs = _convert_fingerprint(made_with, theirs)
            if not theirs:
                log_once(
                    f"{prefix}: made by an earlier version with the tokenizer {made_with or '(not recorded)'}; can't "
                    f"check whether {name} gives the same ids"
                )
                continue
        if theirs == own:
            continue
        problem = (
            f"{prefix} was made with the tokenizer {made_with or '(not recorded)'} (fingerprint {theirs}), but this "
            f"run uses {name} ({own}), which gives other ids"
        )
        if not allow_other:
            raise DataError(
                f"{problem}. Make the corpus with this tokenizer (`oarlock data pretrain --tokenizer {name} ...`); or, "
                "if the model is trained from scratch, use the corpus' own with --tokenizer_name_or_path; or, if the "
                "ids are known to agree, add --allow_other_tokenizer"
            )
        log_once(f"{problem}; continuing because of --allow_other_tokenizer")


def _compute_earlier_fingerprints(tokenizer: Any, name: str) -> set[str]:
    """Return the fingerprints of earlier versions: of the bytes of tokenizer.json, or of the vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    found = {hashlib.sha256(vocabulary.encode()).hexdigest()[:16]}
    path = Path(name).expanduser() / "tokenizer.json"
    return found | ({hashlib.sha256(path.read_bytes()).hexdigest()[:16]} if path.is_file() else set())


def _convert_fingerprint(made_with: str, fingerprint: str) -> str:
    """Return the current fingerprint of a tokenizer that an earlier version recorded, "" if it can't be found."""
    if not Path(made_with).expanduser().is_dir():
        return ""
    try:
        tokenizer = load_tokenizer(made_with)
    except OarlockError:
        return ""
    return (
        compute_ids_fingerprint(tokenizer) if fingerprint in _compute_earlier_fingerprints(tokenizer, made_with) else ""
    )
