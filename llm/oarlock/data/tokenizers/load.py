"""Load tokenizers as people have them, with paddlenlp or, for plain encoding, without importing it."""

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
from oarlock.data.tokenizers.fingerprint import ids_fingerprint
from oarlock.data.tokenizers.folder import needs_paddlenlp, read_tokenizer
from oarlock.data.tokenizers.paddlenlp_tokenizers import paddlenlp_tokenizer
from oarlock.data.tokenizers.schema import read_tokenizer_config
from oarlock.errors import ModelError, first_line
from oarlock.files import file_sha256
from oarlock.formats.links import check_links
from oarlock.hub import downloads

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "tiktoken.model"),
)
# What is asked of a hub, in the order of the rule; the first that is there decides.
_HUB_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "config.json"),
    *("generation_config.json", "tokenizer.json"),
)
_HUB_VOCABULARIES = (("tokenizer.model",), ("sentencepiece.bpe.model",), ("vocab.json", "merges.txt"), ("tekken.json",))


def has_tokenizer(folder: Path) -> bool:
    """Whether there is the vocabulary of one."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(name_or_path: str) -> FastTokenizer | PretrainedTokenizerBase:
    """A tokenizer from a folder (or the tokenizer.json in it) or a hub name.

    The ids are those of the folder's tokenizer.json (see oarlock.data.tokenizers.folder); a class of PaddleNLP is taken
    for what no tokenizer.json expresses (ChatGLM, GLM).

    Raises:
        ModelError: naming the folder and the files it lacks or that can't be read, or the hub name that was not found.
    """
    folder = Path(name_or_path).expanduser()
    folder = folder.parent if folder.name == "tokenizer.json" and folder.is_file() else folder
    if not folder.is_dir():
        folder = _from_hub(name_or_path)
    check_links(folder)
    config = read_tokenizer_config(folder / "tokenizer_config.json")
    if not (has_tokenizer(folder) or config):
        raise ModelError(
            f"{folder}: no tokenizer in this folder (looked for {', '.join(_VOCABULARIES)}); "
            "name another with --tokenizer_name_or_path"
        )
    return paddlenlp_tokenizer(folder, config) if needs_paddlenlp(folder, config) else read_tokenizer(folder)


def _from_hub(name: str) -> Path:
    """The folder of the cache with a tokenizer's files, which are downloaded where they are not there."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"tokenizer {name}: no such folder")

    def fetch(*names: str) -> list[Path]:
        try:
            return [found for file in names if (found := downloads.fetch(name, [file]))]
        except ModelError as error:
            raise ModelError(
                f"tokenizer {name}: can't be loaded from this name (no such folder here, and no hub gave it): "
                f"{first_line(error)}"
            ) from error

    found = fetch(*_HUB_FILES)
    if not any(file.name == "tokenizer.json" for file in found):
        found += next((files for names in _HUB_VOCABULARIES if (files := fetch(*names))), [])
    if not found:
        raise ModelError(f"tokenizer {name}: no such folder here, and no hub has a tokenizer under this name")
    return found[0].parent


def encode_marked(
    tokenizer: FastTokenizer | PretrainedTokenizerBase, texts: Sequence[MarkedText]
) -> list[TokenizedText]:
    """Ids and offsets of texts, without begin and end tokens added; special tokens only outside of literal ranges."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return encode_marked_slowly(tokenizer, texts)
    return get_marked_encoder(tokenizer).encode(texts) if texts else []


def special_spellings(tokenizer: FastTokenizer | PretrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens as they are written, the longest first."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return list_slow_spellings(tokenizer)
    return get_marked_encoder(tokenizer).spellings


def tokenizer_fingerprint(tokenizer: FastTokenizer | PretrainedTokenizerBase) -> str:
    """Changes when the ids of a text, its special tokens, or what is put around it may change."""
    if isinstance(tokenizer, FastTokenizer):
        special = sorted(tokenizer.special_tokens_map.items())
        return hashlib.sha256(
            json.dumps([ids_fingerprint(tokenizer), special, tokenizer.encode("a")]).encode()
        ).hexdigest()
    parts = [ids_fingerprint(tokenizer), json.dumps(sorted(tokenizer.special_tokens_map.items()), default=str)]
    files = [getattr(tokenizer, name, None) for name in ("vocab_file", "merges_file", "sp_model_file")]
    parts += [file_sha256(file) for file in files if isinstance(file, str) and Path(file).is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Encoder:
    """Documents to ids, nothing else, without begin and end tokens added.

    Attributes:
        encode_and_tell: texts -> ids of each, and whether each spells a special token.
        vocab_size: ids are below it.
        eos_id: appended after a document.
        fingerprint: changes when the ids do (see oarlock.data.tokenizers.fingerprint).
    """

    encode_and_tell: Callable[[Sequence[str]], tuple[list[np.ndarray], list[bool]]]
    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text."""
        return self.encode_and_tell(texts)[0]


def load_encoder(name_or_path: str, parse_special_tokens: bool = False) -> Encoder:
    """An Encoder for a tokenizer folder or hub name; without paddle, where PaddleNLP's classes are not needed.

    Args:
        parse_special_tokens: a special token that a document spells becomes that token; else it is text.

    Raises:
        ModelError: when it can't be loaded, or has no end-of-sequence token.
    """
    tokenizer = load_tokenizer(name_or_path)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer {name_or_path} has no end-of-sequence token to put between documents; name it as eos_token in "
            "its tokenizer_config.json"
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
            literal = [told and not parse_special_tokens for told in spelled]
            rows = [encode_slowly(tokenizer, text, as_text)[1] for text, as_text in zip(texts, literal, strict=True)]
            return [np.asarray(row, dtype=np.int32) for row in rows], spelled

    return Encoder(encode, len(tokenizer), int(tokenizer.eos_token_id), ids_fingerprint(tokenizer))
