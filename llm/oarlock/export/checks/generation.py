"""Check the types and ranges of what servers read from generation_config.json. Imports no Paddle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.export.checks.findings import Finding, format_value, read_object
from oarlock.files import GENERATION_FILE
from oarlock.sampling.params import RANGES
from oarlock.sampling.ranges import Range

_CORRECT = "Correct or delete it"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_LENGTH = Range(0, 1 << 30, "from 0", is_whole=True)
_COUNT = Range(1, 1 << 20, "at least 1", is_whole=True)
_SHARE = Range(0, 1, "from 0 to 1")
# Oarlock's own sampling parameters have their ranges in RANGES. transformers and vLLM read the others.
_RANGES = {name: RANGES[name] for name in ("temperature", "top_p", "repetition_penalty")} | {
    "top_k": Range(-1, 1 << 31, "at least 0 (-1 or 0 for all)", is_whole=True),
    "max_new_tokens": _LENGTH, "min_new_tokens": _LENGTH, "max_length": _LENGTH, "min_length": _LENGTH,
    "no_repeat_ngram_size": _LENGTH, "num_beams": _COUNT, "num_beam_groups": _COUNT, "num_return_sequences": _COUNT,
    "min_p": _SHARE, "typical_p": _SHARE, "epsilon_cutoff": _SHARE, "eta_cutoff": _SHARE,
    "diversity_penalty": Range(0, 100, "from 0 to 100"), "length_penalty": Range(-100, 100, "from -100 to 100"),
}  # fmt: skip
_FLAGS = ("do_sample", "use_cache", "output_scores", "return_dict_in_generate", "remove_invalid_values")


def check_generation(folder: Path, config: Mapping[str, Any] | str) -> list[Finding]:
    """Find settings that are malformed or out of range.

    Args:
        config: the result of read_object() for config.json.
    """
    settings = read_object(folder / GENERATION_FILE)
    if settings == "is missing":
        return []
    if isinstance(settings, str):
        return [Finding("generation", GENERATION_FILE, f"the file {settings}, so generation fails", _CORRECT)]
    rows, found = read_vocab_size(config), []
    for name, value in settings.items():
        problem = "" if value is None else _find_problem(name, value, rows)
        if problem:
            found.append(Finding("generation", f"{GENERATION_FILE}, {name}", problem, _CORRECT))
    return found


def read_vocab_size(config: Mapping[str, Any] | str) -> int | None:
    """The vocab_size of config.json; None if there is none or it is malformed."""
    rows = config.get("vocab_size") if isinstance(config, Mapping) else None
    return rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else None


def _find_problem(name: str, value: Any, rows: int | None) -> str:
    if name == "custom_generate":
        return "it names code, which servers that trust remote code run"
    if name in _TOKENS:
        many = name == "eos_token_id"
        for token in value if many and isinstance(value, list) else [value]:
            least = 0 if many else -1  # -1: there is none
            if isinstance(token, bool) or not isinstance(token, int) or token < least:
                return f"must be a token id{' or a list of token ids' * many}; it is {format_value(value)}"
            if rows is not None and token >= rows:
                return f"token {token:,} is beyond the {rows:,} rows of the embedding (vocab_size)"
        return ""
    if name in _FLAGS and not isinstance(value, bool):
        return f"must be true or false; it is {format_value(value)}"
    about = _RANGES.get(name)
    if about is not None and not (about.is_number(value) and about.holds(value)):
        kind = "whole number" if about.is_whole else "number"
        return f"must be a {kind} {about.words}; it is {format_value(value)}"
    return ""
