"""Whether two tokenizers give the same ids: a fingerprint of what decides them, and nothing else.

The same tokenizer saved by another tool has another tokenizer.json: merges as strings or pairs, defaults written or
not, a post-processor, a decoder, flags of offsets. None of that decides which ids a text becomes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from oarlock.data.tokenizers.fast_tokenizer import FastTokenizer

# Before the hash, so that fingerprints of another kind (of earlier versions: 16 hex digits) are told apart.
_KIND = "ids-"
_IDLE = ("trim_offsets", "dropout", "type_id")  # parts of a tokenizer.json that no id depends on


def ids_fingerprint(tokenizer: Any) -> str:
    """Of the vocabulary, of how texts are normalised and cut, of the added tokens, and of the end token.

    Args:
        tokenizer: a FastTokenizer, or one of PaddleNLP's.
    """
    if isinstance(tokenizer, FastTokenizer):
        content = _deciding(tokenizer.backend_tokenizer)
    else:
        settings = {
            name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, (bool, int, float))
        }
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "settings": settings}
    content["end"] = tokenizer.eos_token_id
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return _KIND + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def same_kind(fingerprint: str) -> bool:
    """Whether a noted fingerprint is one of this kind, and can be compared."""
    return fingerprint.startswith(_KIND)


def _deciding(backend: Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(backend.to_str())
    model = content["model"]
    merges = model.pop("merges", None) or []
    if _spells_every_byte(content):  # nothing is ever unknown
        model.update(unk_token=None, fuse_unk=False)
    found = {name: _plain(content.get(name)) for name in ("normalizer", "pre_tokenizer", "model")}
    found["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    # Flags that are off are not told from those left out; each token has the same ones.
    found["added"] = sorted((token["id"], sorted(_plain(token).items())) for token in content["added_tokens"])
    found["special_as_text"] = backend.encode_special_tokens
    return found


def _spells_every_byte(content: dict[str, Any]) -> bool:
    """Whether the vocabulary has a token for each byte, and a text comes to be spelled with them."""
    model = content["model"]
    if model.get("byte_fallback") and isinstance(model.get("vocab"), dict):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    cuts = json.dumps(content.get("pre_tokenizer"))
    return '"ByteLevel"' in cuts and all(letter in model["vocab"] for letter in pre_tokenizers.ByteLevel.alphabet())


def _plain(content: Any) -> Any:
    """Without what is off, empty or of no consequence, and without a sequence around a single step."""
    if isinstance(content, dict):
        steps = content.get("normalizers") or content.get("pretokenizers")
        if content.get("type") == "Sequence" and isinstance(steps, list) and len(steps) == 1:
            return _plain(steps[0])
        kept = {name: _plain(value) for name, value in content.items() if name not in _IDLE}
        return {
            name: value
            for name, value in kept.items()
            if value not in (None, False, "", [], {}) or (value == 0 and value is not False)
        }
    return [_plain(value) for value in content] if isinstance(content, list) else content
