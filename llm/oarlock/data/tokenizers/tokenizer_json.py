"""Reading a tokenizer.json, with errors that name the part that can't be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from oarlock.data.tokenizers.library_errors import is_panic
from oarlock.data.tokenizers.schema import read_tokenizer_object
from oarlock.errors import ModelError, first_line


def read_tokenizer_json(path: Path, special: set[str]) -> Tokenizer:
    """Read a tokenizer.json and mark the tokens as special that the configuration calls special.

    Raises:
        ModelError: with the part that this version of the `tokenizers` library does not support.
    """
    content = read_tokenizer_object(path)
    for token in content.get("added_tokens") or []:
        token["special"] = bool(token.get("special")) or token.get("content") in special
    try:
        return Tokenizer.from_str(json.dumps(content))
    except BaseException as error:  # the library raises bare Exception, and panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise ModelError(f"{path}: {_find_unreadable_part(content)}{first_line(error)}") from error


def _find_unreadable_part(content: Mapping[str, Any]) -> str:
    bare: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
    }
    bare |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    bare["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"):
        try:
            Tokenizer.from_str(json.dumps({**bare, part: content.get(part)}))
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            kind = content[part].get("type") if isinstance(content.get(part), dict) else content.get(part)
            here = version("tokenizers")
            return (
                f"its {part} ({kind}) is not supported by the installed version of the `tokenizers` library ({here}): "
            )
    return "not a tokenizer: "
