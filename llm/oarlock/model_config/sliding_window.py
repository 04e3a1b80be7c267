"""Sliding windows in the fields of PaddleNLP's configurations of Mistral and Qwen2. Nothing here needs Paddle.

PaddleNLP's own models ignore them; our decoder, which families.config_reading.read_windows() gives a window for each
layer, does not. Families with our own configurations have transformers' fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarlock.errors import ModelError
from oarlock.families.registry import find_family, find_hf_config

_DEFAULT = 4096  # of both families, on both sides
_LAYERS = 28  # default of max_window_layers
_SLIDING, _FULL = "sliding_attention", "full_attention"


def from_hugging_face(family: str, content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Make PaddleNLP's fields, with transformers' layer_types where they can't say it.

    Raises:
        ModelError: for layers of an unknown kind.
    """
    kinds = content.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {_SLIDING, _FULL}):
        raise ModelError(f"{place}: layer_types: only {_FULL} and {_SLIDING} are known here")
    if find_family(family).own_config:
        slides = bool(content.get("sliding_window") and content.get("use_sliding_window", True))
        if "layer_types" not in find_hf_config(family).fields and set(kinds or ()) - {_SLIDING if slides else _FULL}:
            raise ModelError(f"{place}: layer_types: all layers of {family} are of one kind, by sliding_window")
        return {}
    layers = find_family(family).sliding_window
    if not layers:
        if kinds and _SLIDING in kinds:
            raise ModelError(f"{place}: layer_types: transformers' {family} has no {_SLIDING}")
        return {}
    window = content.get("sliding_window", _DEFAULT)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ModelError(f"{place}: sliding_window has to be a whole number above 0 or null; it is {window!r}")
    if layers == "all_layers":
        if kinds is not None and len(set(kinds)) > 1:
            raise ModelError(f"{place}: layer_types: all layers of {family} are of one kind")
        return {"sliding_window": window if kinds is None or _SLIDING in kinds else None}
    used = bool(content.get("use_sliding_window", False)) and window is not None
    first = content.get("max_window_layers", _LAYERS)
    found = {"use_sliding_window": used, "sliding_window": window, "max_window_layers": first}
    if kinds is not None and used:  # per layer; overrides max_window_layers
        first = kinds.index(_SLIDING) if _SLIDING in kinds else len(kinds)
        is_upper = _FULL not in kinds[first:]
        found |= {"max_window_layers": first} if is_upper else {"layer_types": kinds}
    return found


def to_hugging_face(config: Any) -> dict[str, Any]:
    """Make the fields of transformers."""
    window = getattr(config, "sliding_window", None)
    match find_family(config.model_type).sliding_window:
        case "all_layers":
            return {"sliding_window": window}
        case "upper_layers":
            kinds = getattr(config, "layer_types", None)
            return {
                "use_sliding_window": bool(config.use_sliding_window),
                "sliding_window": window,
                "max_window_layers": config.max_window_layers,
                **({} if kinds is None else {"layer_types": kinds}),
            }
    return {}
