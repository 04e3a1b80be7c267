"""A corpus remembers its tokenizer: ids of another one are in range and mean other text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.data.corpus.notes import corpus_summary
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

    A corpus beside which nothing is noted, or only what earlier versions noted, is refused where its tokenizer can
    still be found and is another one; else it is taken, and that is said.

    Args:
        prefixes: of the corpora.
        name: of the tokenizer, for people.
        allow_other: say it and go on.

    Raises:
        DataError: with the names of both tokenizers.
    """
    own = compute_ids_fingerprint(tokenizer)
    for prefix in prefixes:
        notes = corpus_summary(prefix)
        theirs, made_with = str(notes.get("tokenizer_fingerprint") or ""), str(notes.get("tokenizer") or "")
        if not theirs:
            log_once(f"{prefix}: no note of the tokenizer that made it ({prefix}.json); {name} is taken to be the one")
            continue
        if not is_comparable(theirs):
            if theirs in _earlier_fingerprints(tokenizer, name):
                continue
            theirs = _of_earlier_versions(made_with, theirs)
            if not theirs:
                log_once(
                    f"{prefix}: made by an earlier version with the tokenizer {made_with or '(not noted)'}; whether "
                    f"{name} gives the same ids can't be told"
                )
                continue
        if theirs == own:
            continue
        problem = (
            f"{prefix} was made with the tokenizer {made_with or '(not noted)'} (fingerprint {theirs}), this run has "
            f"{name} ({own}): the same text has other ids"
        )
        if not allow_other:
            raise DataError(
                f"{problem}. Make the corpus with this tokenizer (`oarlock data pretrain --tokenizer {name} ...`), "
                "name the corpus' own with --tokenizer_name_or_path where the model is trained from the start, or "
                "add --allow_other_tokenizer where the ids are known to agree"
            )
        log_once(f"{problem}; going on all the same")


def _earlier_fingerprints(tokenizer: Any, name: str) -> set[str]:
    """What versions before this one noted: of the bytes of tokenizer.json, or of the vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    found = {hashlib.sha256(vocabulary.encode()).hexdigest()[:16]}
    path = Path(name).expanduser() / "tokenizer.json"
    return found | ({hashlib.sha256(path.read_bytes()).hexdigest()[:16]} if path.is_file() else set())


def _of_earlier_versions(made_with: str, fingerprint: str) -> str:
    """Today's fingerprint of the tokenizer that an earlier version noted; "" where it is no longer to be found."""
    if not Path(made_with).expanduser().is_dir():
        return ""
    try:
        tokenizer = load_tokenizer(made_with)
    except OarlockError:
        return ""
    return compute_ids_fingerprint(tokenizer) if fingerprint in _earlier_fingerprints(tokenizer, made_with) else ""
