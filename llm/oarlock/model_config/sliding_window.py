"""Sliding windows: how many tokens back a model of Mistral or Qwen2 attends. PaddleNLP's models ignore the limit.

Texts up to the window's length have the same logits with and without it. Longer ones are refused. Nothing here needs
Paddle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES, find_family

_DEFAULT = 4096  # of both families, on both sides
_LAYERS = 28  # default of max_window_layers
_SLIDING, _FULL = "sliding_attention", "full_attention"


def from_hugging_face(family: str, content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Make PaddleNLP's fields. Its classes keep them, but its models do not read them.

    Raises:
        ModelError: for layers of an unknown kind.
    """
    kinds = content.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {_SLIDING, _FULL}):
        raise ModelError(f"{place}: layer_types: only {_FULL} and {_SLIDING} are known here")
    layers = find_family(family).sliding_window
    if not layers:
        if kinds and _SLIDING in kinds:
            raise ModelError(f"{place}: layer_types: PaddleNLP's {family} has no {_SLIDING}")
        return {}
    window = content.get("sliding_window", _DEFAULT)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ModelError(f"{place}: sliding_window has to be a whole number or null; it is {window!r}")
    if layers == "all_layers":
        return {"sliding_window": window if kinds is None or _SLIDING in kinds else None}
    if kinds is not None:  # per layer; overrides the other fields
        used = bool(content.get("use_sliding_window")) and window is not None and _SLIDING in kinds
        return {"use_sliding_window": used, "sliding_window": window, "max_window_layers": 0}
    return {
        "use_sliding_window": bool(content.get("use_sliding_window", False)),
        "sliding_window": window,
        "max_window_layers": content.get("max_window_layers", _LAYERS),
    }


def to_hugging_face(config: Any) -> dict[str, Any]:
    """Make the fields of transformers."""
    window = getattr(config, "sliding_window", None)
    match find_family(config.model_type).sliding_window:
        case "all_layers":
            return {"sliding_window": window}
        case "upper_layers":
            return {
                "use_sliding_window": bool(config.use_sliding_window),
                "sliding_window": window,
                "max_window_layers": config.max_window_layers,
            }
    return {}


def find_window(config: Any) -> int | None:
    """The window of PaddleNLP's configuration; None if models attend to all of a text."""
    family, window = FAMILIES.get(getattr(config, "model_type", "")), getattr(config, "sliding_window", None)
    if family is None or not family.sliding_window or window is None:
        return None
    used = family.sliding_window == "all_layers" or (
        config.use_sliding_window and config.max_window_layers < config.num_hidden_layers
    )
    if not used:
        return None
    return int(window)


def check_window(config: Any, longest: int, place: str, what: str) -> None:
    """Refuse texts that are longer than the window.

    Args:
        longest: tokens of a text.
        what: asks for that many, as the beginning of a sentence.

    Raises:
        ModelError: naming the field.
    """
    window = find_window(config)
    if window is not None and longest > window:
        raise ModelError(
            f"{what} {longest:,} tokens, but the model only attends to the last {window:,} (sliding_window in "
            f"{place}), which PaddleNLP's {config.model_type} does not compute: use at most that many"
        )
