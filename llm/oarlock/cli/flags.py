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

import argparse
import dataclasses
import functools
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from oarlock.config.options import Check, OptionSpec, option, section_specs, shown

OptionsT = TypeVar("OptionsT")
_METAVARS = {int: "N", float: "N", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class _Form:
    """The form of a field on the command line."""

    is_positional: bool
    metavar: str
    group: str
    several: bool
    takes_rest: bool
    help_from: type | None = None


_FLAG = _Form(False, "", "", False, False)  # of a field that is declared with option()


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
        _Form(False, metavar, group, several, False), default, *checks, unit=unit, aliases=aliases, choices=choices
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
    return _declare(_Form(True, metavar, "", False, takes_rest), default, *checks, choices=choices)


def config_flag(section_class: type, name: str, metavar: str = "") -> Any:
    """Declare a flag that is an option of a configuration: with its default, checks, choices and help.

    Args:
        section_class: section of the configuration that declares the option.
        name: of the option, and of the field that is declared here.
        metavar: the word for its value in --help.
    """
    declared = next(item for item in dataclasses.fields(section_class) if item.name == name)
    form = _Form(False, metavar, "", False, False, section_class)
    return field(default=declared.default, metadata={**declared.metadata, "form": form})


def _declare(form: _Form, default: Any, *checks: Check, **declaration: Any) -> Any:
    metadata = option(default, *checks, **declaration).metadata
    return field(default=default, metadata={**metadata, "form": form})


# the parser


class CommandParser(argparse.ArgumentParser):
    """The parser of one command. Its flags are added when it parses or prints, so that other commands start fast."""

    command: Command[Any] | ConfigCommand | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words behind the command's name; a ConfigCommand gets them as they are."""
        if isinstance(self.command, ConfigCommand):
            namespace = namespace or argparse.Namespace()
            namespace.command, namespace.words = self.command, list(args)
            return namespace, []
        self.add_flags()
        return super().parse_known_args(args, namespace)

    def add_flags(self) -> None:
        """Add the flags of the command, once."""
        command, self.command = self.command, None
        if not isinstance(command, Command):
            return
        self.set_defaults(command=command)
        forms = {item.name: item.metadata.get("form", _FLAG) for item in dataclasses.fields(command.options)}
        groups: dict[str, Any] = {"": self}
        specs = section_specs(command.options)
        own = [name for name in specs if name in command.options.__annotations__]
        for name in dict.fromkeys((*own, *specs)):  # the flags that it inherits come last
            spec, form = specs[name], forms[name]
            if form.help_from is not None:
                spec = dataclasses.replace(spec, help=section_specs(form.help_from)[name].help)
            if form.group not in groups:
                groups[form.group] = self.add_argument_group(form.group)
            _add(groups[form.group], spec, form)
        for name, instead in command.removed.items():
            self.add_argument(*_spellings((name,)), action=_Removed, nargs="?", const=instead, help=argparse.SUPPRESS)


class _Removed(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.error(f"{self.option_strings[0]}: {self.const}")


class _HelpFormatter(argparse.HelpFormatter):
    """Shows each flag once, with dashes, and keeps it on one line."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings, action.option_strings = action.option_strings, [w for w in action.option_strings if "_" not in w]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def add_commands(
    parser: argparse.ArgumentParser, commands: Sequence[AnyCommand], title: str = "commands", required: bool = False
) -> None:
    """Add subcommands to a parser.

    Args:
        required: whether a command line without one of them is an error.
    """
    places = parser.add_subparsers(title=title, metavar="COMMAND", required=required, parser_class=CommandParser)
    for command in commands:
        if isinstance(command, CommandGroup):
            group = places.add_parser(command.name, help=command.help)
            add_commands(group, command.commands, f"{command.name} commands", required=True)
            continue
        own = places.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        own.command = command


def run_parsed(namespace: argparse.Namespace) -> int:
    """Run the command that was parsed."""
    command = namespace.command
    if isinstance(command, ConfigCommand):
        return command.run(namespace.words)
    values = {item.name: getattr(namespace, item.name) for item in dataclasses.fields(command.options)}
    options = command.options(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
    return command.run(options)


def _add(parser: Any, spec: OptionSpec, form: _Form) -> None:
    is_required = spec.default is MISSING
    is_tuple = typing.get_origin(spec.type) is tuple
    if is_tuple:
        spec = dataclasses.replace(spec, type=typing.get_args(spec.type)[0])
    settings: dict[str, Any] = {"help": _help_text(spec)}
    if spec.type is bool:
        name, action = (f"no_{spec.name}", "store_false") if spec.default else (spec.name, "store_true")
        parser.add_argument(*_spellings((name, *spec.aliases)), dest=spec.name, action=action, **settings)
        return
    settings["type"] = functools.partial(_read, spec)
    if spec.choices:
        settings["choices"] = spec.choices
    elif form.metavar or not form.is_positional:
        settings["metavar"] = form.metavar or _METAVARS[spec.type]
    if not is_required:
        settings["default"] = list(spec.default) if is_tuple else spec.default
    if form.is_positional:
        words = argparse.REMAINDER if form.takes_rest else "+" if is_tuple else None if is_required else "?"
        parser.add_argument(spec.name, nargs=words, **settings)
        return
    if is_tuple:
        settings |= {"nargs": "+"} if form.several else {"action": "append"}
    parser.add_argument(*_spellings((spec.name, *spec.aliases)), dest=spec.name, required=is_required, **settings)


def _spellings(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(f"--{spelling}" for name in names for spelling in (name.replace("_", "-"), name)))


def _help_text(spec: OptionSpec) -> str:
    """The text under the field, with the default where that is a value and the text does not name it."""
    text = spec.help.replace("%", "%%")
    default = f"{spec.default:g}" if isinstance(spec.default, float) else spec.default
    if isinstance(default, (str, int)) and not isinstance(default, bool) and default != "" and "efault" not in text:
        text = f"{text} Default: {default}."
    return text


def _read(spec: OptionSpec, word: str) -> Any:
    """The value of a word on the command line. An empty word is None where a flag may be None, and "none" is a word.

    Raises:
        ArgumentTypeError: with what is wrong with it.
    """
    if not word and spec.optional:
        return None
    try:
        value = dataclasses.replace(spec, optional=False, choices=()).convert(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if (problem := spec.problem(value)) is not None:
        raise argparse.ArgumentTypeError(f"{problem}; got {shown(word)}")
    return value
