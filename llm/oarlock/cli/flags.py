"""Flags of a subcommand, declared as the fields of a dataclass like the options of a configuration.

    @dataclass(frozen=True, kw_only=True)
    class ResizeOptions:
        output: Path = flag(metavar="DIR")
        \"\"\"Folder to write. It must not exist yet.\"\"\"
        multiple_of: int = flag(64, at_least(1))
        \"\"\"Round the number of rows up to a multiple of this.\"\"\"

    COMMAND = Command("resize", "Grow a model's embedding for added tokens.", ResizeOptions, run)

The text under a field is its help, and its default is added to that. A field without a default is required. Each flag
is accepted with dashes and with underscores. The type of a field says how its flag is written:

    int, float, str, Path       --name VALUE
    bool, default False         --name
    bool, default True          --no-name
    tuple[T, ...]               --name VALUE --name VALUE, or --name VALUE VALUE where `several` is set
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Generic, TypeVar

from oarlock.config.options import Check, option

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Form:
    """The form of a field on the command line."""

    is_positional: bool
    metavar: str
    group: str
    several: bool
    takes_rest: bool
    help_from: type | None = None


PLAIN_FLAG = Form(False, "", "", False, False)  # of a field that is declared with option()


@dataclass(frozen=True)
class Command(Generic[OptionsT]):
    """A subcommand.

    Attributes:
        name: the word behind `oarlock`.
        help: one sentence, shown by `oarlock --help` and on top of the command's own help.
        options: dataclass of `flag`, `positional` and `option` fields.
        run: does the work with the parsed options and returns the exit code. It imports what is slow to import.
        removed: flags of earlier versions, and what replaces each. Using one is an error that says so.
    """

    name: str
    help: str
    options: type[OptionsT]
    run: Callable[[OptionsT], int]
    removed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandGroup:
    """A subcommand with subcommands of its own."""

    name: str
    help: str
    commands: tuple[Command[Any], ...]


@dataclass(frozen=True)
class ConfigCommand:
    """A subcommand that reads its words itself, with a recipe and all options of a configuration.

    Attributes:
        run: gets the words behind the command's name and returns the exit code.
    """

    name: str
    help: str
    run: Callable[[Sequence[str]], int]


AnyCommand = Command[Any] | CommandGroup | ConfigCommand


@dataclass(frozen=True)
class NoOptions:
    """Options of a command that has none."""


def flag(
    default: Any = MISSING,
    *checks: Check,
    metavar: str = "",
    group: str = "",
    several: bool = False,
    unit: str = "",
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    help: str = "",
) -> Any:
    """Declare a flag.

    Args:
        default: its value when it is not given; without one the flag is required.
        checks: functions value -> None or what is wrong with it.
        metavar: the word for its value in --help.
        group: title under which --help lists it.
        several: for a tuple: one flag takes several words. Otherwise the flag is repeated.
        unit: what the number counts.
        aliases: other spellings.
        choices: the words it may be.
        help: in place of the text under the field, for fields that are made by a program.
    """
    declared = _declare(
        Form(False, metavar, group, several, False), default, *checks, unit=unit, aliases=aliases, choices=choices
    )
    return field(default=default, metadata={**declared.metadata, "help": help})


def positional(
    default: Any = MISSING,
    *checks: Check,
    metavar: str = "",
    choices: tuple[str, ...] = (),
    takes_rest: bool = False,
) -> Any:
    """Declare a word without a flag; for a tuple, one or more of them.

    Args:
        default: its value when it is not given; without one it is required.
        takes_rest: whether it takes all words to the end of the line, flags included.
    """
    return _declare(Form(True, metavar, "", False, takes_rest), default, *checks, choices=choices)


def config_flag(section_class: type, name: str, metavar: str = "") -> Any:
    """Declare a flag that is an option of a configuration: with its default, checks, choices and help.

    Args:
        section_class: section of the configuration that declares the option.
        name: of the option, and of the field that is declared here.
        metavar: the word for its value in --help.
    """
    declared = next(item for item in dataclasses.fields(section_class) if item.name == name)
    form = Form(False, metavar, "", False, False, section_class)
    return field(default=declared.default, metadata={**declared.metadata, "form": form})


def _declare(form: Form, default: Any, *checks: Check, **declaration: Any) -> Any:
    metadata = option(default, *checks, **declaration).metadata
    return field(default=default, metadata={**metadata, "form": form})
