"""Reading untrusted JSON: bounded size and depth, no duplicate fields, finite numbers, and a schema."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, overload

from oarlock.errors import ModelError, OarlockError
from oarlock.formats.files import is_missing, read_bytes
from oarlock.formats.json_places import find_doubled_line, find_line, find_too_deep_line

if TYPE_CHECKING:
    from pydantic_core import SchemaValidator

Checked = TypeVar("Checked")

# Size limits for each kind of file. The largest published ones: a config.json of 100 KB, an index of 15 MB (a hundred
# thousand experts), a tokenizer of 40 MB.
CONFIG_BYTES = 4 << 20
INDEX_BYTES = 64 << 20
TOKENIZER_BYTES = 256 << 20
MAX_DEPTH = 64  # levels; tokenizers have 8
# Objects and lists, of at least 64 bytes each. The merges of the largest tokenizer are 600,000.
MAX_CONTAINERS = 2_000_000
MAX_DIGITS = 40  # of an integer; 64 bits have 20. Python takes seconds to parse a million digits
_MOST_PROBLEMS = 1000
_WITH_ELEMENTS = ("list", "tuple", "set", "frozenset", "dict")
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is a prefix of this one
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class _Refused(ValueError):
    """Content that JSON's grammar or Python would accept, and that is refused here."""


class _Doubled(_Refused):
    """A duplicate field in an object."""


def read_json(
    path: str | Path,
    schema: type[Checked],
    *,
    error: type[OarlockError] = ModelError,
    limit: int = CONFIG_BYTES,
    depth: int = MAX_DEPTH,
    containers: int = MAX_CONTAINERS,
    extra: Literal["allow", "ignore", "forbid"] | None = None,
) -> Checked:
    """Read a file and check it against a schema.

    Args:
        schema: a dataclass, a TypedDict, or a type such as dict[str, int]. Types are not converted: "5" is not an int.
            `dict[str, Any]` accepts any object.
        limit: largest size of the file in bytes.
        depth: largest nesting depth of objects and lists.
        containers: largest number of objects and lists.
        extra: how to treat fields that the schema does not name. By default the schema decides; if it does not say,
            they are left out.

    Raises:
        OarlockError: of class `error`, with file, line, field and what would be right. Also if the file is missing.
    """
    content = read_bytes(path, limit=limit, what="JSON file of this kind", error=error)
    return parse_json(
        content, str(path), schema, error=error, limit=limit, depth=depth, containers=containers, extra=extra
    )


def read_json_if_there(
    path: str | Path,
    schema: type[Checked],
    *,
    error: type[OarlockError] = ModelError,
    limit: int = CONFIG_BYTES,
    depth: int = MAX_DEPTH,
    extra: Literal["allow", "ignore", "forbid"] | None = None,
) -> Checked | None:
    """Read a file as read_json does. Return None if it is missing; a dangling link is an error."""
    if is_missing(path):
        return None
    return read_json(path, schema, error=error, limit=limit, depth=depth, extra=extra)


@overload
def parse_json(
    text: str | bytes, name: str, schema: None = None, *, error: type[OarlockError] = ..., limit: int = ...,
    depth: int = ..., containers: int = ..., extra: Literal["allow", "ignore", "forbid"] | None = ...,
) -> Any: ...  # fmt: skip
@overload
def parse_json(
    text: str | bytes, name: str, schema: type[Checked], *, error: type[OarlockError] = ..., limit: int = ...,
    depth: int = ..., containers: int = ..., extra: Literal["allow", "ignore", "forbid"] | None = ...,
) -> Checked: ...  # fmt: skip
def parse_json(
    text: str | bytes,
    name: str,
    schema: type[Checked] | None = None,
    *,
    error: type[OarlockError] = ModelError,
    limit: int = CONFIG_BYTES,
    depth: int = MAX_DEPTH,
    containers: int = MAX_CONTAINERS,
    extra: Literal["allow", "ignore", "forbid"] | None = None,
) -> Any:
    """Parse a JSON text as read_json does. Without a schema, any JSON is accepted.

    Args:
        name: the name of the text in messages, before :line.
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(content) > limit:
        raise error(f"{name}: {len(content):,} bytes is too large for JSON of this kind (at most {limit:,} are read)")
    text = _decoded(content, name, error)
    _check_nesting(content, text, name, depth, containers, error)
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_no_number
        )
        if _ESCAPED_SURROGATE.search(text):
            _check_characters(found)
    except _Doubled as problem:
        line = find_doubled_line(text)
        raise error(f"{name}{f':{line}' if line else ''}: {problem} appears twice in one object") from problem
    except _Refused as problem:
        # The beginning of a long part is enough; a pattern of megabytes would take seconds.
        place = re.search(re.escape(problem.args[1][: MAX_DIGITS + 1]), text, re.IGNORECASE)
        line = text.count("\n", 0, place.start() if place else 0) + 1
        raise error(f"{name}:{line}: {problem.args[0]}") from problem
    except json.JSONDecodeError as problem:
        raise error(f"{name}:{problem.lineno}: not valid JSON: {problem.msg} (column {problem.colno})") from problem
    except (ValueError, RecursionError, MemoryError) as problem:
        raise error(f"{name}: not readable as JSON: {problem}") from problem
    return found if schema is None else _checked(found, text, name, schema, error, extra)


def _decoded(content: bytes, name: str, error: type[OarlockError]) -> str:
    for mark, encoding in _ENCODINGS.items():
        if content.startswith(mark):
            raise error(f"{name}: {encoding}; JSON is read as UTF-8 (save it so)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(f"{name}:{line}: not UTF-8 (byte 0x{content[problem.start]:02x})") from problem


def _check_nesting(
    content: bytes, text: str, name: str, depth: int, containers: int, error: type[OarlockError]
) -> None:
    """Refuse too much nesting, or too many objects and lists, before any of them is built."""
    if content.count(b"[") + content.count(b"{") <= depth:
        return
    levels, found = measure_nesting(content)
    if found > containers:
        raise error(f"{name}: more than {containers:,} objects and lists, too many for a file of this kind")
    if levels > depth:
        raise error(f"{name}:{find_too_deep_line(text, depth)}: objects and lists more than {depth} levels deep")


def measure_nesting(content: bytes) -> tuple[int, int]:
    """Return the nesting depth of a JSON text, and its number of objects and lists."""
    brackets = _STRING.sub(b"", content).translate(None, _NOT_BRACKETS)
    levels = max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0)
    return levels, brackets.count(b"[") + brackets.count(b"{")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Doubled(find_doubled_field(pairs))
    return found


def find_doubled_field(pairs: list[tuple[str, Any]]) -> str:
    """Name the first duplicate field of an object, for a message."""
    twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return f"field {twice[:200]!r}"


def _whole(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > MAX_DIGITS:
        raise _Refused(f"an integer of {count:,} digits (at most {MAX_DIGITS} are read)", digits)
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _Refused(f"{digits[:40]} is too large for a number", digits)
    return number


def _no_number(word: str) -> NoReturn:
    raise _Refused(f"{word} is not a JSON number", word)


def _check_characters(found: Any) -> None:
    """Refuse lone surrogates, which can't be encoded in UTF-8."""
    left = [found]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as problem:
                escape = f"\\u{ord(item[problem.start]):04x}"
                raise _Refused(f"{escape} is a lone surrogate", escape) from None


def check_content(
    found: Any,
    name: str,
    schema: type[Checked],
    *,
    error: type[OarlockError] = ModelError,
    extra: Literal["allow", "ignore", "forbid"] | None = None,
) -> Checked:
    """Check parsed content against a schema, as read_json does.

    Raises:
        OarlockError: of class `error`, with the field and what would be right.
    """
    from pydantic_core import ValidationError

    from oarlock.formats.messages import describe_schema

    try:
        return cast(Checked, _validator(cast(Any, schema)).validate_python(found, strict=True, extra=extra))
    except ValidationError as problem:
        _, sentence, more = describe_schema(problem, found)
        raise error(f"{name}: {sentence}{more}") from problem


@functools.cache
def _validator(schema: Any) -> SchemaValidator:
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

    return SchemaValidator(_stopping(TypeAdapter(schema).core_schema))


def _stopping(schema: Any) -> Any:
    """Make lists and mappings of a schema stop at their first error: a million errors take a gigabyte."""
    if isinstance(schema, list | tuple):
        return type(schema)(_stopping(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    found = {name: _stopping(part) for name, part in schema.items()}
    return found | {"fail_fast": True} if found.get("type") in _WITH_ELEMENTS else found


def _checked(
    found: Any,
    text: str,
    name: str,
    schema: type[Checked],
    error: type[OarlockError],
    extra: Literal["allow", "ignore", "forbid"] | None,
) -> Checked:
    if schema is dict or schema == dict[str, Any]:
        if not isinstance(found, dict):
            raise error(f"{name}: not a JSON object")
        return cast(Checked, found)
    from pydantic_core import ValidationError

    from oarlock.formats.messages import describe_schema

    try:
        # Validates the text, not `found`: only then are lists converted to tuples and objects to dataclasses.
        return cast(Checked, _validator(cast(Any, schema)).validate_json(text.encode(), strict=True, extra=extra))
    except ValidationError as problem:
        if problem.error_count() > _MOST_PROBLEMS:
            raise error(f"{name}: {problem.error_count():,} fields are wrong or unknown") from problem
        field, sentence, more = describe_schema(problem, found)
        line = find_line(text, field)
        raise error(f"{name}{f':{line}' if line else ''}: {sentence}{more}") from problem
