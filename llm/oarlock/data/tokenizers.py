"""Load tokenizers as people have them, with paddlenlp or, for plain encoding, without importing it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.data.marked_encoding import TokenizedText, marked_encoder
from oarlock.data.marked_text import MarkedText
from oarlock.errors import ModelError
from oarlock.files import file_sha256, read_json_object

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

# Hugging Face writes tokenizer classes that PaddleNLP's AutoTokenizer does not know; all of them are a tokenizer.json
# behind the `tokenizers` library, which PaddleNLP's PretrainedTokenizerFast loads.
_GENERIC_FAST = "PretrainedTokenizerFast"
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is the vocabulary of one."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(name_or_path: str) -> PretrainedTokenizerBase:
    """A PaddleNLP tokenizer from a folder or a hub name.

    Raises:
        ModelError: naming the folder and the files it lacks, or the hub name that could not be had.
    """
    from paddlenlp.transformers import AutoTokenizer, PretrainedTokenizerFast

    folder = Path(name_or_path)
    if folder.is_dir():
        config = read_json_object(folder / "tokenizer_config.json")
        if not (has_tokenizer(folder) or (folder / "tokenizer_config.json").exists()):
            raise ModelError(
                f"{folder}: no tokenizer in this folder (looked for {', '.join(_VOCABULARIES)}); "
                "name another with --tokenizer_name_or_path"
            )
        if (folder / "tokenizer.json").exists() and not _knows(config.get("tokenizer_class")):
            return PretrainedTokenizerFast.from_pretrained(str(folder))
    # Hugging Face's name of a sentencepiece model; PaddleNLP's Llama looks for another.
    piece = folder / "tokenizer.model"
    named = piece.is_file() and not (folder / "sentencepiece.bpe.model").exists()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **({"vocab_file": str(piece)} if named else {}))
    except Exception as error:  # the hub clients raise everything from OSError to their own classes
        kind = "folder" if folder.is_dir() else "name (no such folder here, and no hub gave it)"
        raise ModelError(f"tokenizer {name_or_path}: can't be loaded from this {kind}: {_first_line(error)}") from error
    return tokenizer


def _knows(class_name: str | None) -> bool:
    """Whether PaddleNLP's AutoTokenizer can make this class."""
    from paddlenlp.transformers.auto.tokenizer import tokenizer_class_from_name

    if not class_name:
        return False
    return tokenizer_class_from_name(class_name) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def batch_encode(tokenizer: PretrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts in which all special tokens stand already; on all cores where the tokenizer is a fast one."""
    from paddlenlp.transformers import PretrainedTokenizerFast

    if not texts:
        return []
    own = getattr(type(tokenizer), "_batch_encode_plus", None) is not PretrainedTokenizerFast._batch_encode_plus
    if isinstance(tokenizer, PretrainedTokenizerFast) and not own and not tokenizer.split_special_tokens:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [row.ids for row in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [list(row) for row in rows]


def encode_marked(tokenizer: PretrainedTokenizerBase, texts: Sequence[MarkedText]) -> list[TokenizedText]:
    """Ids and offsets of texts, without begin and end tokens added; special tokens only outside of literal ranges.

    Raises:
        ModelError: for a tokenizer without a tokenizer.json.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(f"{type(tokenizer).__name__}: not a tokenizer of the `tokenizers` library")
    return marked_encoder(tokenizer).encode(texts) if texts else []


def special_spellings(tokenizer: PretrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens as they are written, the longest first."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return tuple(sorted(map(str, tokenizer.all_special_tokens), key=lambda text: (-len(text), text)))
    return marked_encoder(tokenizer).spellings


def tokenizer_fingerprint(tokenizer: PretrainedTokenizerBase) -> str:
    """Changes when the ids that a tokenizer gives may."""
    from paddlenlp.transformers import PretrainedTokenizerFast

    parts = [type(tokenizer).__name__, json.dumps(sorted(tokenizer.special_tokens_map.items()), default=str)]
    if isinstance(tokenizer, PretrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append(json.dumps({key: backend[key] for key in backend if key not in ("truncation", "padding")}))
    else:
        settings = {key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, (bool, int, float))}
        parts += [json.dumps(settings, sort_keys=True), json.dumps(sorted(tokenizer.get_vocab().items()))]
        files = [getattr(tokenizer, name, None) for name in ("vocab_file", "merges_file", "sp_model_file")]
        parts += [file_sha256(file) for file in files if isinstance(file, str) and Path(file).is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Encoder:
    """Text to ids, nothing else, without special tokens added.

    Attributes:
        encode: texts -> ids of each.
        vocab_size: ids are below it.
        eos_id: appended after a document.
        fingerprint: changes when the tokenizer does.
    """

    encode: Callable[[Sequence[str]], list[np.ndarray]]
    vocab_size: int
    eos_id: int
    fingerprint: str


def load_encoder(name_or_path: str) -> Encoder:
    """An Encoder for a tokenizer folder or hub name.

    A folder with tokenizer.json and a generic or *Fast class is read by the `tokenizers` library alone: importing
    paddle costs each worker process seconds and hundreds of MB that text encoding does not need.

    Raises:
        ModelError: when it can't be loaded, or has no end-of-sequence token.
    """
    folder = Path(name_or_path)
    config = read_json_object(folder / "tokenizer_config.json") if folder.is_dir() else {}
    if (folder / "tokenizer.json").is_file() and str(config.get("tokenizer_class", _GENERIC_FAST)).endswith("Fast"):
        return _fast_encoder(folder, config)
    tokenizer = load_tokenizer(name_or_path)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer {name_or_path} has no end-of-sequence token to put between documents")

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [np.asarray(row, dtype=np.int32) for row in rows]

    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    fingerprint = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
    return Encoder(encode, len(tokenizer), int(tokenizer.eos_token_id), fingerprint)


def _fast_encoder(folder: Path, config: dict[str, Any]) -> Encoder:
    from tokenizers import Tokenizer

    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{folder / 'tokenizer.json'}: not a tokenizer: {_first_line(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    eos = config.get("eos_token") or read_json_object(folder / "special_tokens_map.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    eos_id = backend.token_to_id(eos) if eos else None
    if eos_id is None:
        raise ModelError(f"{folder}: no end-of-sequence token (eos_token) to put between documents")

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        rows = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(row.ids, dtype=np.int32) for row in rows]

    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Encoder(encode, size, eos_id, hashlib.sha256(text.encode()).hexdigest()[:16])
