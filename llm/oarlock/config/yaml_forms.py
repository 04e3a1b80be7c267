"""Options that may be lists or mappings in YAML -> the one line that a flag takes."""

from __future__ import annotations

import csv
import io
import re
import shlex
from typing import Any

from oarlock.config.options import shown

# A weight before a path, as in "0.7 data/a"; "all" stands for as much as the set holds.
_WEIGHTED = re.compile(r"(all|[0-9.]+(?:[eE][-+]?\d+)?)\s+(\S.*)", re.DOTALL)


def blend_text(value: Any) -> str:
    """'w1 path1 w2 path2 ...' of a list or a mapping.

    A mapping has paths and weights. Elements of a list are a path, "weight path", or {path: ..., weight: ...}; those
    without a weight count as all that they hold.

    Raises:
        ValueError: saying what an element must be.
    """
    pairs = list(value.items()) if isinstance(value, dict) else [_pair(item) for item in value]
    if not pairs:
        raise ValueError("must name at least one path; got none")
    return " ".join(f"{weight} {shlex.quote(str(path))}" for path, weight in pairs)


def _pair(item: Any) -> tuple[str, Any]:
    if isinstance(item, str):
        found = _WEIGHTED.fullmatch(item.strip())
        return (found[2], found[1]) if found else (item, "all")
    if isinstance(item, dict) and "path" in item and set(item) <= {"path", "weight"}:
        return str(item["path"]), item.get("weight", "all")
    raise ValueError(f"an element must be a path, 'weight path', or {{path: ..., weight: ...}}; got {shown(item)}")


def columns_text(value: Any) -> str:
    """'field=column,...' of a mapping.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, dict):
        raise ValueError("must be a mapping field: column, or text like prompt=question,response=answer")
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([f"{field}={column}" for field, column in value.items()])
    return text.getvalue()
