"""Refusing a tokenizer.json that makes texts far longer, e.g. by a chain of replacements that each double it."""

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

_MAX_GROWTH = 4096  # output bytes per input byte. Replacing spaces by 12-letter names, then bytes by letters, makes 24
_MAX_ADDED = 4096  # characters added before a text, or tokens added around it
_PROPERTY = re.compile(r"\\[pP](\{[^}]*\}|\w)|\[:\^?\w+:\]")  # character properties in Oniguruma's syntax


def check_growth(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer that makes a text far longer.

    Args:
        content: of tokenizer.json.

    Raises:
        ModelError: with the part that does.
    """
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        parts = list(_walk_objects(content.get(name)))
        try:
            times = math.prod(_bound_growth(part, name) for part in parts)
        except ValueError as error:
            raise ModelError(f"{path}: {name}: invalid precompiled_charsmap: {error}") from error
        if times > _MAX_GROWTH:
            shown = f"{times:,}" if times < 10**12 else "more than 10^12"
            raise ModelError(f"{path}: {name} makes a text up to {shown} times as long (at most {_MAX_GROWTH:,})")
        added = sum(len(text) for part in parts if isinstance(text := part.get("prepend"), str))
        if added > _MAX_ADDED:
            raise ModelError(f"{path}: {name} adds {added:,} characters before a text (at most {_MAX_ADDED:,})")
    added = 0
    for part in _walk_objects(content.get("post_processor")):
        tokens = part.get("special_tokens")
        for field, most in (("single", 1), ("pair", 2)):
            pieces = part.get(field)
            pieces = [piece for piece in pieces if isinstance(piece, dict)] if isinstance(pieces, list) else []
            if sum("Sequence" in piece for piece in pieces) > most:
                raise ModelError(f"{path}: post_processor: {field} contains a text more than once")
            for piece in pieces:  # a special token of a template adds the ids that are listed for it
                special = piece.get("SpecialToken")
                about = (
                    tokens.get(special.get("id")) if isinstance(special, dict) and isinstance(tokens, dict) else None
                )
                ids = about.get("ids") if isinstance(about, dict) else None
                added += len(ids) if isinstance(ids, list) else 0
    if added > _MAX_ADDED:
        raise ModelError(f"{path}: post_processor adds {added:,} tokens around a text (at most {_MAX_ADDED:,})")


def _walk_objects(part: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in nested objects and lists."""
    left = [part]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _bound_growth(part: Mapping[str, Any], name: str) -> int:
    """Return an upper bound of the output bytes per input byte of a part.

    Raises:
        ValueError: if a normalizer's table can't contain its trie. The library would allocate it unchecked.
    """
    if isinstance(table := part.get("precompiled_charsmap"), str):
        content = base64.b64decode(table, validate=True)  # size of a trie, the trie, NUL-terminated texts
        size = int.from_bytes(content[:4], "little")
        if size % 4 or not 0 < size <= len(content) - 4:
            raise ValueError(f"its trie has {size:,} bytes, but the table only {len(content):,}")
        return max(1, *map(len, content[4 + size :].split(b"\0")))
    kind, text, pattern = part.get("type"), part.get("content"), part.get("pattern")
    if kind == "ByteLevel" and name != "decoder":
        return 2  # each byte becomes a letter of one or two bytes
    if kind != "Replace" or not isinstance(text, str) or not isinstance(pattern, dict):
        return 1
    size = len(text.encode("utf-8", "replace"))
    if isinstance(found := pattern.get("String"), str):
        return max(1, -(-size // max(1, len(found.encode("utf-8", "replace")))))
    try:
        expression = _PROPERTY.sub("x", str(pattern.get("Regex")))
        shortest = int(importlib.import_module(_PARSER).parse(expression).getwidth()[0])
    except (re.error, RecursionError, OverflowError):
        shortest = 0
    # A pattern that may match an empty string inserts the text between all characters.
    return max(1, size) if shortest > 0 else size + 1
