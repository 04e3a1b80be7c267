"""Options that may be lists or mappings in YAML, converted to the text of a flag."""

from __future__ import annotations

import csv
import io
import re
import shlex
from typing import Any

from oarlock.config.options import shown

# A weight before a path, as in "0.7 data/a". "all" means the size of the data set.
_WEIGHTED = re.compile(r"(all|[0-9.]+(?:[eE][-+]?\d+)?)\s+(\S.*)", re.DOTALL)


def format_blend(value: Any) -> str:
    """Convert a list or a mapping to 'w1 path1 w2 path2 ...'.

    A mapping has paths as keys and weights as values. Elements of a list are a path, "weight path", or {path: ...,
    weight: ...}. A data set without a weight counts with its size.

    Raises:
        ValueError: an element has another form.
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


def format_columns(value: Any) -> str:
    """Convert a mapping to 'field=column,...'.

    Raises:
        ValueError: the value is not a mapping.
    """
    if not isinstance(value, dict):
        raise ValueError("must be a mapping field: column, or text like prompt=question,response=answer")
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([f"{field}={column}" for field, column in value.items()])
    return text.getvalue()
