"""Checks that the tensors of a PEFT adapter are those that its adapter_config.json describes.

PEFT ignores a tensor that its configuration has no place for, and computes the scaling from the configuration's rank.
Where the two files disagree, programs that trust one of them compute other values than those that trust the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.environment.console import log_once
from oarlock.errors import ModelError
from oarlock.weights.safetensors_file import SafetensorsFile

_INDEX = re.compile(r"\.(\d+)\.")


def check_tensors(path: Path, content: Mapping[str, Any], parts: Mapping[str, tuple[str, str]]) -> None:
    """Refuse tensors of other layers, ranks and kinds than the configuration describes, and incomplete pairs.

    Args:
        path: of adapter_model.safetensors.
        content: of adapter_config.json, without nulls.
        parts: stored tensor -> its layer, and "A" or "B".

    Raises:
        ModelError: naming the tensor.
    """
    pairs: dict[str, set[str]] = {}
    for layer, which in parts.values():
        pairs.setdefault(layer, set()).add(which)
    half = next((layer for layer, both in pairs.items() if len(both) == 1), None)
    if half is not None:
        raise ModelError(f"{path}: {half} has only {pairs[half].pop()}; a LoRA layer has A and B")
    with SafetensorsFile(path) as file:
        for stored, (layer, which) in parts.items():
            about = file.tensors[stored]
            if len(about.shape) != 2 or about.dtype.kind in "iub":
                raise ModelError(f"{path}: {stored} is {about.dtype} {list(about.shape)}, not a LoRA matrix")
            rank = about.shape[0 if which == "A" else 1]
            said = find_by_pattern(content.get("rank_pattern") or {}, layer, content.get("r", 8))
            if rank != said:
                raise ModelError(
                    f"{path}: {stored} has rank {rank}, adapter_config.json says {said} (r, rank_pattern): one of "
                    "the two files belongs to another adapter"
                )
            problem = _find_mismatch(layer, content)
            if problem:
                raise ModelError(f"{path}: {stored} exists, but {problem}: PEFT would not use it; fix one of the two")
    absent = [
        name for name in _as_list(content.get("target_modules")) if not any(_matches(layer, name) for layer in pairs)
    ]
    if absent:
        log_once(f"{path}: adapter_config.json names {', '.join(map(str, absent))}, and the file has no tensor of it")


def find_by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Find the rank or alpha of a layer: that of the first pattern its name ends with (as PEFT's get_pattern_key)."""
    for pattern, value in patterns.items():
        wanted = pattern.removeprefix("^")
        if layer == wanted or (wanted == pattern and _matches(layer, pattern)):
            return value
    return default


def _find_mismatch(layer: str, content: Mapping[str, Any]) -> str:
    targets, only = _as_list(content.get("target_modules")), content.get("layers_to_transform")
    if targets and not any(_matches(layer, name) for name in targets):
        return "target_modules in adapter_config.json does not name its layer"
    index = _INDEX.search(layer)
    if only is not None and index and int(index[1]) not in (_as_list(only) or [only]):
        return "layers_to_transform in adapter_config.json leaves its layer out"
    return ""


def _matches(layer: str, name: Any) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
