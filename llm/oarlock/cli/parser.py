"""The argument parser that is made from the declared commands."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from oarlock.cli.flags import PLAIN_FLAG, AnyCommand, Command, CommandGroup, ConfigCommand, Form
from oarlock.config.options import OptionSpec, list_section_specs, shown

_METAVARS = {int: "N", float: "N", str: "TEXT", Path: "PATH"}


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
        forms = {item.name: item.metadata.get("form", PLAIN_FLAG) for item in dataclasses.fields(command.options)}
        groups: dict[str, Any] = {"": self}
        specs = list_section_specs(command.options)
        own = [name for name in specs if name in command.options.__annotations__]
        for name in dict.fromkeys((*own, *specs)):  # the flags that it inherits come last
            spec, form = specs[name], forms[name]
            if form.help_from is not None:
                spec = dataclasses.replace(spec, help=list_section_specs(form.help_from)[name].help)
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


def _add(parser: Any, spec: OptionSpec, form: Form) -> None:
    is_required = spec.default is MISSING
    is_tuple = typing.get_origin(spec.type) is tuple
    if is_tuple:
        spec = dataclasses.replace(spec, type=typing.get_args(spec.type)[0])
    text = spec.help.replace("%", "%%")
    default = f"{spec.default:g}" if isinstance(spec.default, float) else spec.default
    # The default is named where it is a value and the text does not name it.
    if isinstance(default, (str, int)) and not isinstance(default, bool) and default != "" and "efault" not in text:
        text = f"{text} Default: {default}."
    settings: dict[str, Any] = {"help": text}
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
