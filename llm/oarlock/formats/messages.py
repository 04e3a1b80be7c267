"""Messages for the errors that a schema finds in a file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

Field = tuple[str | int, ...]

_LONGEST = 80  # characters of a wrong value in a message
_IN_WORDS = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "set_type": "must be a list",
    "dict_type": "must be an object",
    "dataclass_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "none_required": "must be null",
    "extra_forbidden": "is not a known field here",
    "unexpected_keyword_argument": "is not a known field here",
}


_SHOULD = re.compile(r"^(Input|String|List|Dictionary|Tuple|Set|Value|Keys) should")


def describe_schema(problem: ValidationError, found: Any) -> tuple[Field, str, str]:
    """Return the field of the first problem, a sentence about it, and a note on the others.

    Args:
        found: the content that was checked.
    """
    errors = problem.errors(include_url=False, include_context=False)
    fields = [_place(error["loc"], found) for error in errors]
    # A union reports an error for each of its members. Those about one field are joined.
    field = fields[0]
    alike = [error for error, place in zip(errors, fields, strict=True) if place == field]
    missing = [str(error["loc"][-1]) for error in alike if error["type"] in ("missing", "missing_argument")]
    if missing:
        listed = f"{missing[0]} is" if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]} are"
        sentence = f"{_path(field) + ': ' if field else ''}{listed} missing"
    else:
        wanted = list(dict.fromkeys(_words(error) for error in alike))
        if "must be a number" in wanted:  # covers integers
            wanted = [words for words in wanted if words != "must be an integer"]
        joined = " or ".join([wanted[0], *(words.removeprefix("must be ") for words in wanted[1:])])
        sentence = f"{_path(field) or 'the content'} {joined}"
        if alike[0]["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
            for step in field:
                found = found[step]
            sentence += f"; got {_shown(found)}"
    others = len({place for place in fields if place != field})
    return field, sentence, f" (and {others} more fields)" if others else ""


def _words(error: Any) -> str:
    if error["type"] in _IN_WORDS:
        return _IN_WORDS[error["type"]]
    message: str = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return _SHOULD.sub("must", message, count=1)


def _place(location: tuple[str | int, ...], found: Any) -> Field:
    """Return the part of a location that exists in the content. The rest names union members or a missing field."""
    place: list[str | int] = []
    for step in location:
        in_list = isinstance(found, list) and isinstance(step, int) and step < len(found)
        if in_list or (isinstance(found, dict) and step in found):
            place, found = [*place, step], found[step]
    return tuple(place)


def _path(field: Field) -> str:
    """Format a path: `rope_scaling.factor`, `layers[3].name`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in field)
    return text.removeprefix(".")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
