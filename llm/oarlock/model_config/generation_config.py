"""generation_config.json: which tokens end an answer, and the default sampling settings.

Training, checkpoints, merging, conversion and export all carry it along. Nothing here needs Paddle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le, MaxLen
from typing_extensions import TypedDict

from oarlock.errors import ModelError
from oarlock.files import GENERATION_FILE
from oarlock.formats.json_file import read_json_if_there
from oarlock.sampling.params import OPTIONS, RANGES

_Token = Annotated[int, Ge(-1), Le(2**31 - 1)]
_SAMPLING = [option for option in OPTIONS.values() if option.in_generation_config]
_SAMPLING_TYPES: dict[str, Any] = {
    option.name: int | None if option.kind is int else int | float | None for option in _SAMPLING
}


# What is read of generation_config.json; the rest is carried along.
GenerationFields: Any = TypedDict(
    "GenerationFields",
    {
        "bos_token_id": _Token | None,
        "eos_token_id": _Token | Annotated[list[_Token], MaxLen(4096)] | None,
        "pad_token_id": _Token | None,
        "do_sample": bool | None,
        "decode_strategy": Annotated[str, MaxLen(200)] | None,
        **_SAMPLING_TYPES,  # type: ignore[misc]
    },
    total=False,
)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read the file; {} if there is none.

    Raises:
        ModelError: naming the field that is wrong.
    """
    return dict(read_json_if_there(folder / GENERATION_FILE, GenerationFields, extra="allow") or {})


def read_token_ids(value: Any, place: str) -> tuple[int, ...]:
    """Read a field that holds one token, a list of tokens, or null.

    Raises:
        ModelError: for anything else.
    """
    tokens = value if isinstance(value, (list, tuple)) else [value]
    found = tuple(token for token in tokens if token is not None)
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in found):
        raise ModelError(f"{place}: eos_token_id has to be a token id or a list of them; it is {value!r}")
    return found


def find_end_tokens(generation: Mapping[str, Any], config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Collect the tokens that end an answer from the tokenizer, config.json and generation_config.json, sorted.

    Args:
        generation: content of generation_config.json.
        config: PaddleNLP's configuration.
        tokenizer: may be None.
    """
    found: set[int] = set()
    for given, place in (
        (getattr(tokenizer, "eos_token_id", None), "the tokenizer"),
        (getattr(config, "eos_token_id", None), "config.json"),
        (generation.get("eos_token_id"), GENERATION_FILE),
    ):
        found.update(read_token_ids(given, place))
    return tuple(sorted(found))


def read_sampling_defaults(generation: Mapping[str, Any], place: str = GENERATION_FILE) -> dict[str, float | int]:
    """Read the settings for requests without their own: temperature, top_p, top_k, repetition_penalty, as given.

    As in transformers, the temperature applies if do_sample is true (or PaddleNLP's decode_strategy is "sampling");
    else the
    most likely token is chosen. Without a top_k there is no limit (as in vLLM; transformers uses 50).

    Raises:
        ModelError: for a value out of its range.
    """
    given = {name: value for name, value in generation.items() if value is not None}
    samples = given.get("do_sample") is True or given.get("decode_strategy") == "sampling"
    if samples:
        given.setdefault("temperature", 1.0)
    else:
        given.pop("temperature", None)
    found: dict[str, float | int] = {option.name: given[option.name] for option in _SAMPLING if option.name in given}
    for name, value in found.items():
        if not RANGES[name].is_number(value) or not RANGES[name].holds(value):
            raise ModelError(f"{place}: {name} is {value!r}; it has to be {RANGES[name].words}")
    return found


def read_first_generation_config(places: Iterable[Path]) -> dict[str, Any]:
    """Read it from the first folder that has it."""
    return next((content for place in places if (content := read_generation_config(place))), {})
