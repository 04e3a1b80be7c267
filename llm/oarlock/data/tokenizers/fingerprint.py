"""A fingerprint of everything that determines the ids of a tokenizer, to compare tokenizers.

Another tool may save the same tokenizer with a different tokenizer.json: merges as strings or pairs, defaults written
out or not, a post-processor, a decoder, offset flags. None of these affects the ids of a text.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tokenizers import pre_tokenizers

from oarlock.data.tokenizers.fast_tokenizer import FastTokenizer

# A prefix that distinguishes these fingerprints from those of earlier versions (16 hex digits).
_KIND = "ids-"
_IDLE = ("trim_offsets", "dropout", "type_id")  # fields of a tokenizer.json that do not affect ids


def compute_ids_fingerprint(tokenizer: Any) -> str:
    """Return a fingerprint of the vocabulary, the normalization and splitting of texts, the added tokens, and EOS.

    Args:
        tokenizer: a FastTokenizer, or one of PaddleNLP.
    """
    if isinstance(tokenizer, FastTokenizer):
        backend = tokenizer.backend_tokenizer
        stored: dict[str, Any] = json.loads(backend.to_str())
        model = stored["model"]
        merges = model.pop("merges", None) or []
        if _covers_all_bytes(stored):  # then no text is unknown
            model.update(unk_token=None, fuse_unk=False)
        content = {name: _simplify(stored.get(name)) for name in ("normalizer", "pre_tokenizer", "model")}
        content["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
        # Flags that are off equal missing ones; all tokens have the same flags.
        content["added"] = sorted((token["id"], sorted(_simplify(token).items())) for token in stored["added_tokens"])
        content["special_as_text"] = backend.encode_special_tokens
    else:
        settings = {
            name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, (bool, int, float))
        }
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "settings": settings}
    content["end"] = tokenizer.eos_token_id
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return _KIND + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_comparable(fingerprint: str) -> bool:
    """Return whether a recorded fingerprint is of the current kind and can be compared."""
    return fingerprint.startswith(_KIND)


def _covers_all_bytes(content: dict[str, Any]) -> bool:
    """Return whether the vocabulary can encode each byte."""
    model = content["model"]
    if model.get("byte_fallback") and isinstance(model.get("vocab"), dict):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    cuts = json.dumps(content.get("pre_tokenizer"))
    return '"ByteLevel"' in cuts and all(letter in model["vocab"] for letter in pre_tokenizers.ByteLevel.alphabet())


def _simplify(content: Any) -> Any:
    """Remove fields that are off, empty or irrelevant, and sequences of a single step."""
    if isinstance(content, dict):
        steps = content.get("normalizers") or content.get("pretokenizers")
        if content.get("type") == "Sequence" and isinstance(steps, list) and len(steps) == 1:
            return _simplify(steps[0])
        kept = {name: _simplify(value) for name, value in content.items() if name not in _IDLE}
        return {
            name: value
            for name, value in kept.items()
            if value not in (None, False, "", [], {}) or (value == 0 and value is not False)
        }
    return [_simplify(value) for value in content] if isinstance(content, list) else content
