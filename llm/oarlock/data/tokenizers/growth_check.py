"""How much longer a tokenizer.json makes a text. A chain of replacements doubles it at every link, and is refused."""

from __future__ import annotations

import base64
import importlib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from oarlock.errors import ModelError

_PARSER = "re._parser" if sys.version_info >= (3, 11) else "sre_parse"

_MOST_TIMES = 4096  # as long; a replacement of every blank by a name of twelve letters, and bytes as letters, are 24
_MOST_ADDED = 4096  # characters that are put before a text, tokens that are put around it
_PROPERTY = re.compile(r"\\[pP](\{[^}]*\}|\w)|\[:\^?\w+:\]")  # of characters, in Oniguruma's words


def check_growth(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer that makes far more of a text than it is.

    Args:
        content: of tokenizer.json.

    Raises:
        ModelError: naming the part.
    """
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        parts = list(_parts(content.get(name)))
        try:
            times = math.prod(_times(part, name) for part in parts)
        except ValueError as error:
            raise ModelError(f"{path}: {name}: precompiled_charsmap can't be used: {error}") from error
        if times > _MOST_TIMES:
            shown = f"{times:,}" if times < 10**12 else "more than 10^12"
            raise ModelError(f"{path}: {name} makes a text up to {shown} times as long (at most {_MOST_TIMES:,})")
        added = sum(len(text) for part in parts if isinstance(text := part.get("prepend"), str))
        if added > _MOST_ADDED:
            raise ModelError(f"{path}: {name} puts {added:,} characters before a text (at most {_MOST_ADDED:,})")
    added = 0
    for part in _parts(content.get("post_processor")):
        tokens = part.get("special_tokens")
        for field, most in (("single", 1), ("pair", 2)):
            pieces = part.get(field)
            pieces = [piece for piece in pieces if isinstance(piece, dict)] if isinstance(pieces, list) else []
            if sum("Sequence" in piece for piece in pieces) > most:
                raise ModelError(f"{path}: post_processor: {field} holds a text more than once")
            added += sum(_ids(piece.get("SpecialToken"), tokens) for piece in pieces)
    if added > _MOST_ADDED:
        raise ModelError(f"{path}: post_processor puts {added:,} tokens around a text (at most {_MOST_ADDED:,})")


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """Every object in nested objects and lists."""
    left = [part]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _times(part: Mapping[str, Any], name: str) -> int:
    """How many times as many bytes a part makes of a text, at most."""
    if isinstance(table := part.get("precompiled_charsmap"), str):
        return _longest_entry(table)
    kind, text, pattern = part.get("type"), part.get("content"), part.get("pattern")
    if kind == "ByteLevel" and name != "decoder":
        return 2  # every byte becomes a letter of up to two
    if kind != "Replace" or not isinstance(text, str) or not isinstance(pattern, dict):
        return 1
    size = len(text.encode("utf-8", "replace"))
    if isinstance(found := pattern.get("String"), str):
        return max(1, -(-size // max(1, len(found.encode("utf-8", "replace")))))
    return max(1, size) if _takes_something(pattern.get("Regex")) else size + 1


def _longest_entry(table: str) -> int:
    """Bytes of the longest text in a normaliser's table: the size of a trie, the trie, and texts that end with NUL.

    Raises:
        ValueError: for a size that is not that of a trie in it, which the library would allocate unasked.
    """
    content = base64.b64decode(table, validate=True)
    size = int.from_bytes(content[:4], "little")
    if size % 4 or not 0 < size <= len(content) - 4:
        raise ValueError(f"its trie can't have {size:,} bytes, of {len(content):,} in all")
    return max(1, *map(len, content[4 + size :].split(b"\0")))


def _takes_something(pattern: Any) -> bool:
    """Whether a pattern is known to match a character at least, not the place between two."""
    try:
        return int(importlib.import_module(_PARSER).parse(_PROPERTY.sub("x", str(pattern))).getwidth()[0]) > 0
    except (re.error, RecursionError, OverflowError):
        return False


def _ids(piece: Any, tokens: Any) -> int:
    """How many tokens a special token of a template stands for."""
    about = tokens.get(piece.get("id")) if isinstance(piece, dict) and isinstance(tokens, dict) else None
    ids = about.get("ids") if isinstance(about, dict) else None
    return len(ids) if isinstance(ids, list) else 0
