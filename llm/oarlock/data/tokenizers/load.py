"""Loading tokenizers and encoding texts. PaddleNLP is imported only if a tokenizer needs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from oarlock.data.examples.marked_encoding import TokenizedText, get_marked_encoder
from oarlock.data.examples.marked_encoding_slow import (
    compile_slow_pattern,
    encode_marked_slowly,
    encode_slowly,
    list_slow_spellings,
)
from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.tokenizers.fast_tokenizer import FastTokenizer
from oarlock.data.tokenizers.fingerprint import compute_ids_fingerprint
from oarlock.data.tokenizers.folder import needs_paddlenlp, read_tokenizer
from oarlock.data.tokenizers.paddlenlp_tokenizers import load_paddlenlp_tokenizer
from oarlock.data.tokenizers.schema import read_tokenizer_config
from oarlock.errors import ModelError, first_line
from oarlock.files import compute_sha256
from oarlock.formats.links import check_links
from oarlock.hub import downloads

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "tiktoken.model"),
)
# Files to fetch from a hub. Of the vocabularies, the first that exists is used.
_HUB_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "config.json"),
    *("generation_config.json", "tokenizer.json"),
)
_HUB_VOCABULARIES = (("tokenizer.model",), ("sentencepiece.bpe.model",), ("vocab.json", "merges.txt"), ("tekken.json",))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(name_or_path: str) -> FastTokenizer | PretrainedTokenizerBase:
    """Load a tokenizer from a folder (or the tokenizer.json in it) or a hub name.

    The ids are those of the folder's tokenizer.json (see oarlock.data.tokenizers.folder). A class of PaddleNLP is used
    for tokenizers that no tokenizer.json can express (ChatGLM, GLM).

    Raises:
        ModelError: if files are missing or invalid, or the hub name was not found.
    """
    folder = Path(name_or_path).expanduser()
    folder = folder.parent if folder.name == "tokenizer.json" and folder.is_file() else folder
    if not folder.is_dir():
        folder = _fetch_from_hub(name_or_path)
    check_links(folder)
    config = read_tokenizer_config(folder / "tokenizer_config.json")
    if not (has_tokenizer(folder) or config):
        raise ModelError(
            f"{folder}: no tokenizer in this folder (expected one of {', '.join(_VOCABULARIES)}); "
            "choose another with --tokenizer_name_or_path"
        )
    return load_paddlenlp_tokenizer(folder, config) if needs_paddlenlp(folder, config) else read_tokenizer(folder)


def _fetch_from_hub(name: str) -> Path:
    """Return the cache folder of a tokenizer. Missing files are downloaded."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"tokenizer {name}: no such folder")

    def fetch(*names: str) -> list[Path]:
        try:
            return [found for file in names if (found := downloads.fetch(name, [file]))]
        except ModelError as error:
            raise ModelError(
                f"tokenizer {name}: not a folder, and it could not be loaded from a hub: {first_line(error)}"
            ) from error

    found = fetch(*_HUB_FILES)
    if not any(file.name == "tokenizer.json" for file in found):
        found += next((files for names in _HUB_VOCABULARIES if (files := fetch(*names))), [])
    if not found:
        raise ModelError(f"tokenizer {name}: not a folder, and no hub has a tokenizer of this name")
    return found[0].parent


def encode_marked(
    tokenizer: FastTokenizer | PretrainedTokenizerBase, texts: Sequence[MarkedText]
) -> list[TokenizedText]:
    """Tokenize texts with offsets, without BOS and EOS. Special tokens are recognized only outside literal ranges."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return encode_marked_slowly(tokenizer, texts)
    return get_marked_encoder(tokenizer).encode(texts) if texts else []


def list_special_spellings(tokenizer: FastTokenizer | PretrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of the special tokens, longest first."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return list_slow_spellings(tokenizer)
    return get_marked_encoder(tokenizer).spellings


def compute_tokenizer_fingerprint(tokenizer: FastTokenizer | PretrainedTokenizerBase) -> str:
    """Return a fingerprint of the ids of texts, the special tokens, and the tokens added around a text."""
    if isinstance(tokenizer, FastTokenizer):
        special = sorted(tokenizer.special_tokens_map.items())
        return hashlib.sha256(
            json.dumps([compute_ids_fingerprint(tokenizer), special, tokenizer.encode("a")]).encode()
        ).hexdigest()
    parts = [compute_ids_fingerprint(tokenizer), json.dumps(sorted(tokenizer.special_tokens_map.items()), default=str)]
    files = [getattr(tokenizer, name, None) for name in ("vocab_file", "merges_file", "sp_model_file")]
    parts += [compute_sha256(file) for file in files if isinstance(file, str) and Path(file).is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Encoder:
    """Encodes documents to ids, without BOS and EOS.

    Attributes:
        encode_and_flag: texts -> ids of each, and whether it spells a special token.
        vocab_size: upper bound of the ids.
        eos_id: to append to a document.
        fingerprint: changes when the ids do (see oarlock.data.tokenizers.fingerprint).
    """

    encode_and_flag: Callable[[Sequence[str]], tuple[list[np.ndarray], list[bool]]]
    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts."""
        return self.encode_and_flag(texts)[0]


def load_encoder(name_or_path: str, parse_special_tokens: bool = False) -> Encoder:
    """Load an Encoder for a tokenizer folder or hub name. Paddle is imported only if PaddleNLP's classes are needed.

    Args:
        parse_special_tokens: whether a special token that a document spells becomes that token; if not, it is text.

    Raises:
        ModelError: if it can't be loaded, or has no EOS token.
    """
    tokenizer = load_tokenizer(name_or_path)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer {name_or_path} has no EOS token to put between documents; set eos_token in its "
            "tokenizer_config.json"
        )
    if isinstance(tokenizer, FastTokenizer):
        documents = get_marked_encoder(tokenizer)

        def encode(texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
            rows, spelled = documents.encode_documents(texts, parse_special_tokens)
            return [np.asarray(row, dtype=np.int32) for row in rows], spelled
    else:
        pattern = compile_slow_pattern(tokenizer)

        def encode(texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
            spelled = [bool(pattern.search(text)) for text in texts]
            literal = [found and not parse_special_tokens for found in spelled]
            rows = [encode_slowly(tokenizer, text, as_text)[1] for text, as_text in zip(texts, literal, strict=True)]
            return [np.asarray(row, dtype=np.int32) for row in rows], spelled

    return Encoder(encode, len(tokenizer), int(tokenizer.eos_token_id), compute_ids_fingerprint(tokenizer))
