"""Loading a configuration from defaults, a YAML file with its includes, and flags, with the origin of every value."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.config.options import OptionSpec, list_option_specs, list_section_classes, shown
from oarlock.config.problems import Problems, WrongOptions, listing, map_spellings, suggest
from oarlock.config.recipe_files import RecipeFiles
from oarlock.config.recipes import find_recipe
from oarlock.config.rules import find_cross_problems
from oarlock.config.run_config import RunConfig

ConfigT = typing.TypeVar("ConfigT", bound=RunConfig)


@dataclass
class LoadedConfig(typing.Generic[ConfigT]):
    """A checked configuration and where each value came from ("default", "flag --x", "file.yaml:3")."""

    config: ConfigT
    origins: dict[str, str] = field(default_factory=dict)


def load_config(config_class: type[ConfigT], argv: Sequence[str]) -> LoadedConfig[ConfigT]:
    """Load `[RECIPE] [--flag value ...]`, where RECIPE is a YAML file or the name of a recipe.

    Raises:
        ConfigError: lists every problem, with its flag or file:line and, for unknown names, a suggestion.
    """
    arguments = list(argv)
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    return _load(config_class, recipe, lambda specs, problems: _from_flags(arguments, specs, problems))


def load_options(
    config_class: type[ConfigT], recipe: str | Path | None, options: Mapping[str, Any]
) -> LoadedConfig[ConfigT]:
    """Load an optional recipe, and options as Python values.

    Raises:
        ConfigError: as for load_config().
    """
    return _load(config_class, recipe, lambda specs, problems: _from_arguments(options, specs, problems))


def _load(
    config_class: type[ConfigT],
    recipe: str | Path | None,
    read_options: Callable[[dict[str, OptionSpec], Problems], dict[str, tuple[Any, str]]],
) -> LoadedConfig[ConfigT]:
    specs = list_option_specs(config_class)
    problems = Problems()
    values = RecipeFiles(specs, problems).read(find_recipe(recipe)) if recipe is not None else {}
    values |= read_options(specs, problems)
    converted = {name: spec.default for name, spec in specs.items()}
    origins = dict.fromkeys(specs, "default")
    for name, (raw, origin) in values.items():
        try:
            value = specs[name].convert(raw)
        except ValueError as error:
            problems.append(f"{origin}: {name} {error}")
            continue
        if (problem := specs[name].problem(value)) is not None:
            problems.append(f"{origin}: {name} {problem}; got {shown(value)}")
        converted[name], origins[name] = value, origin
    if problems:
        raise WrongOptions(listing(problems))
    by_section: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        by_section.setdefault(spec.section, {})[name] = converted[name]
    sections = list_section_classes(config_class)
    config = config_class(**{section: sections[section](**items) for section, items in by_section.items()})
    if crossed := find_cross_problems(config):
        raise WrongOptions(listing(crossed))
    return LoadedConfig(config, origins)


def load_flat_config(config_class: type[ConfigT], flat: dict[str, Any]) -> ConfigT:
    """Build a configuration from option names and values; other options have their defaults."""
    arguments = [word for name, value in flat.items() if value is not None for word in (f"--{name}", str(value))]
    return load_config(config_class, arguments).config


def flatten(config: RunConfig) -> dict[str, Any]:
    """Option name -> value, for all sections, in their order."""
    return {
        name: getattr(getattr(config, spec.section), name) for name, spec in list_option_specs(type(config)).items()
    }


def is_default(config: RunConfig, origins: Mapping[str, str], name: str) -> bool:
    """Whether an option has its default because it was not given.

    Args:
        origins: those of a LoadedConfig. Without an origin, the value decides.
    """
    spec = list_option_specs(type(config))[name]
    if name in origins:
        return origins[name] == "default"
    return getattr(getattr(config, spec.section), name) == spec.default


def _from_arguments(
    options: Mapping[str, Any], specs: dict[str, OptionSpec], problems: Problems
) -> dict[str, tuple[Any, str]]:
    names = map_spellings(specs)
    values: dict[str, tuple[Any, str]] = {}
    for name, value in options.items():
        if name in names:
            values[names[name]] = (value, f"argument {name}")
        else:
            problems.append(f"unknown option {name}{suggest(name, value, names, specs)}")
    return values


# flags


def _from_flags(words: list[str], specs: dict[str, OptionSpec], problems: Problems) -> dict[str, tuple[str, str]]:
    """Parse `--x value`, `--x=value`, and for yes/no options `--x` and `--no_x`. Later flags win."""
    names = map_spellings(specs)
    values: dict[str, tuple[str, str]] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--"):
            problems.append(f"{word!r} is not a flag (a YAML file must be the first argument)")
            continue
        flag, equals, value = word[2:].partition("=")
        flag = flag.replace("-", "_")
        name = names.get(flag)
        negated = name is None and flag.startswith("no_") and flag[3:] in names
        if negated:
            name = names[flag[3:]]
        following = words[position] if position < len(words) and not words[position].startswith("--") else None
        if name is None:
            given = value if equals else following
            problems.append(f"unknown flag --{flag}{suggest(flag, given, names, specs, '--')}")
            position += following is not None and not equals
            continue
        is_bool = specs[name].type is bool
        if negated:
            if equals or following is not None or not is_bool:
                problems.append(f"--{flag} is for yes/no options only, and takes no value")
                position += following is not None and not equals
                continue
            value = "false"
        elif not equals:
            if following is not None:
                value, position = following, position + 1
            elif is_bool:
                value = "true"
            else:
                problems.append(f"flag --{flag}: {name} needs a value ({specs[name].kind})")
                continue
        values[name] = (value, f"flag --{flag}")
    return values
