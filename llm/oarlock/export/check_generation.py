"""generation_config.json of an exported directory: what servers take from it, typed and in range. Imports no paddle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.export.findings import Finding, read_object, shown_value
from oarlock.models.generation_config import GENERATION_FILE

_MEND = "Mend or delete it"
_LENGTH = (0, 1 << 30)
_COUNT = (1, 1 << 20)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_WHOLE = {
    "max_new_tokens": _LENGTH, "min_new_tokens": _LENGTH, "max_length": _LENGTH, "min_length": _LENGTH,
    "top_k": (-1, 1 << 31), "num_beams": _COUNT, "num_beam_groups": _COUNT, "num_return_sequences": _COUNT,
    "no_repeat_ngram_size": _LENGTH,
}  # fmt: skip
_NUMBERS = {
    "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1), "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1), "repetition_penalty": (0, 100), "diversity_penalty": (0, 100), "length_penalty": (-100, 100),
}  # fmt: skip
_FLAGS = ("do_sample", "use_cache", "output_scores", "return_dict_in_generate", "remove_invalid_values")


def check_generation(folder: Path, config: Mapping[str, Any] | str) -> list[Finding]:
    """Values that generation stops at, or that mean something else than was meant.

    Args:
        config: config.json, as read_object() gave it.
    """
    settings = read_object(folder / GENERATION_FILE)
    if settings == "is missing":
        return []
    if isinstance(settings, str):
        return [Finding("generation", GENERATION_FILE, f"the file {settings}, and generation stops at it", _MEND)]
    rows, found = rows_of(config), []
    for name, value in settings.items():
        problem = "" if value is None else _problem(name, value, rows)
        if problem:
            found.append(Finding("generation", f"{GENERATION_FILE}, {name}", problem, _MEND))
    return found


def rows_of(config: Mapping[str, Any] | str) -> int | None:
    """vocab_size, where config.json has one that can be one."""
    rows = config.get("vocab_size") if isinstance(config, Mapping) else None
    return rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else None


def _problem(name: str, value: Any, rows: int | None) -> str:
    if name in _TOKENS:
        return _token_problem(value, rows, many=name == "eos_token_id")
    if name in _FLAGS and not isinstance(value, bool):
        return f"it has to be true or false; it is {shown_value(value)}"
    if name in _WHOLE and not (_is_whole(value) and _WHOLE[name][0] <= value <= _WHOLE[name][1]):
        low, high = _WHOLE[name]
        return f"it has to be a whole number from {low} to {high:,}; it is {shown_value(value)}"
    if name in _NUMBERS and not (_is_number(value) and _NUMBERS[name][0] <= value <= _NUMBERS[name][1]):
        low, high = _NUMBERS[name]
        return f"it has to be a number from {low} to {high}; it is {shown_value(value)}"
    return ""


def _token_problem(value: Any, rows: int | None, many: bool) -> str:
    tokens = value if many and isinstance(value, list) else [value]
    for token in tokens:
        if not _is_whole(token) or token < 0:
            return f"it has to be a token id{' or a list of them' * many}; it is {shown_value(value)}"
        if rows is not None and token >= rows:
            return f"token {token:,} is beyond the {rows:,} rows of the embedding (vocab_size)"
    return ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))
