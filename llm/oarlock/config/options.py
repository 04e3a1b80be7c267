"""Declaring options: a typed dataclass field with its check, unit and other spellings.

The string literal below a field is its help. Example:

    @dataclass(frozen=True)
    class Batch:
        per_device_train_batch_size: int = option(8, at_least(1), unit="samples")
        \"\"\"Samples per micro-batch on each data-parallel rank.\"\"\"
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Check = Callable[[Any], "str | None"]

TRUE_WORDS = frozenset({"1", "true", "yes", "y", "t", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "n", "f", "off"})
NONE_WORDS = frozenset({"none", "null", ""})
_LONGEST_SHOWN = 200  # characters of a value in a message
_LARGEST = 1 << 63  # Paddle's integers have 64 bits
_METADATA = ("checks", "unit", "aliases", "choices", "may_change", "from_yaml")


def option(
    default: Any,
    *checks: Check,
    unit: str = "",
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    may_change: bool = False,
    from_yaml: Callable[[Any], str] | None = None,
) -> Any:
    """Declare an option.

    Args:
        default: the value if neither YAML nor flags give one.
        checks: functions of the value that return None or a problem. They are not called for None.
        unit: what the number counts ("samples", "tokens", "steps"), shown in --help.
        aliases: other published spellings of the same option.
        choices: the allowed values.
        may_change: a run may be resumed with another value, because it does not change what is learnt.
        from_yaml: converts a list or a mapping in YAML to text; raises ValueError.
    """
    meta = {
        "checks": checks,
        "unit": unit,
        "aliases": aliases,
        "choices": choices,
        "may_change": may_change,
        "from_yaml": from_yaml,
    }
    return field(default=default, metadata=meta)


def at_least(minimum: float) -> Check:
    """The value must be >= minimum."""
    return lambda value: None if value >= minimum else f"must be at least {minimum}"


def more_than(minimum: float) -> Check:
    """The value must be > minimum."""
    return lambda value: None if value > minimum else f"must be more than {minimum}"


def between(low: float, high: float) -> Check:
    """The value must lie in [low, high]."""
    return lambda value: None if low <= value <= high else f"must lie in [{low}, {high}]"


def degree(value: int) -> str | None:
    """A parallel degree: -1 means not used (as in PaddleNLP), otherwise a positive count of ranks."""
    return None if value == -1 or value >= 1 else "must be -1 (not used) or at least 1"


@dataclass(frozen=True)
class OptionSpec:
    """One option of a configuration, as the parser, the help and the checks need it."""

    section: str
    name: str
    type: type
    optional: bool
    default: Any
    checks: tuple[Check, ...]
    unit: str
    aliases: tuple[str, ...]
    choices: tuple[str, ...]
    may_change: bool
    from_yaml: Callable[[Any], str] | None
    help: str

    def convert(self, value: Any) -> Any:
        """Convert a flag's text or a YAML value to the option's type.

        Raises:
            ValueError: the value is invalid; the message says what was expected.
        """
        if value is None or (self.optional and isinstance(value, str) and value.lower() in NONE_WORDS):
            if self.optional:
                return None
            raise ValueError(f"needs a value ({self.kind})")
        if self.from_yaml is not None and isinstance(value, (list, dict)):
            value = self.from_yaml(value)
        converted = _CONVERTERS[self.type](value)
        if self.choices and converted not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}; got {shown(value)}")
        return converted

    def problem(self, value: Any) -> str | None:
        """The problem that the option's checks find in a converted value, or None."""
        if value is None:
            return None
        return next((message for check in self.checks if (message := check(value)) is not None), None)

    @property
    def kind(self) -> str:
        """The type as text, for --help and messages."""
        if self.choices:
            return "|".join(self.choices)
        word = {bool: "yes or no", int: "whole number", float: "number", str: "text", Path: "path"}[self.type]
        return f"{word}, {self.unit}" if self.unit else word


def shown(value: Any, quoted: bool = True) -> str:
    """A value as text for a message, truncated if it is long.

    Args:
        quoted: write text in quotation marks, as Python does.
    """
    text = repr(value) if quoted else str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text):,} characters)"


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError(f"must be yes/no, true/false or 1/0; got {shown(value)}")


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(f"must be a whole number; got {shown(value)}")
    try:
        number = float(value)
        if number == int(number) and abs(number) < _LARGEST:
            return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"must be a whole number; got {shown(value)}")


def _to_float(value: Any) -> float:
    if not isinstance(value, bool):
        try:
            number = float(value)
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"must be a number; got {shown(value)}")


def _to_str(value: Any) -> str:
    if isinstance(value, (list, dict)):
        raise ValueError(f"must be text; got a {'list' if isinstance(value, list) else 'mapping'}")
    return str(value)


_CONVERTERS: dict[type, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    Path: Path,
}


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, with normalised whitespace."""
    docs: dict[str, str] = {}
    for base in cls.__mro__[1:-1]:
        docs = _field_docs(base) | docs
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):  # of make_dataclass(): the help is in the metadata
        return docs
    assert isinstance(tree, ast.ClassDef)
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[statement.target.id] = " ".join(below.value.value.split())
    return docs


@functools.cache
def list_section_classes(config_class: Hashable) -> dict[str, type]:
    """The sections of a configuration class by name, in the order of --help.

    That is the order of declaration, except that a field with metadata {"after": NAME} follows the section NAME, which
    a base class declares.
    """
    names: list[str] = []
    for item in dataclasses.fields(config_class):  # type: ignore[arg-type]
        after = item.metadata.get("after")
        names.insert(names.index(after) + 1 if after else len(names), item.name)
    hints = typing.get_type_hints(config_class)
    return {name: hints[name] for name in names}


@functools.cache
def list_option_specs(config_class: Hashable) -> dict[str, OptionSpec]:
    """Every option of a configuration class, by name, in the order of its sections."""
    specs: dict[str, OptionSpec] = {}
    for section, section_class in list_section_classes(config_class).items():
        for name, spec in list_section_specs(section_class, section).items():
            assert name not in specs, f"option {name} is declared twice"
            specs[name] = spec
    return specs


def list_section_specs(section_class: type, section: str = "") -> dict[str, OptionSpec]:
    """Every option of one dataclass whose fields are options, by name."""
    hints, docs = typing.get_type_hints(section_class), _field_docs(section_class)
    specs: dict[str, OptionSpec] = {}
    for item in dataclasses.fields(section_class):
        plain, optional = hints[item.name], False
        if isinstance(plain, types.UnionType) or typing.get_origin(plain) is typing.Union:
            (plain,) = (each for each in typing.get_args(plain) if each is not type(None))
            optional = True
        specs[item.name] = OptionSpec(
            section=section,
            name=item.name,
            type=plain,
            optional=optional,
            default=item.default,
            help=item.metadata.get("help") or docs.get(item.name, ""),
            **{name: item.metadata[name] for name in _METADATA},
        )
    return specs
