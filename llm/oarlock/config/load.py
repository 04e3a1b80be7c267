"""Read a configuration: defaults <- YAML file (with its includes) <- flags, every value with its origin."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from oarlock.config.options import OptionSpec, option_specs
from oarlock.config.rules import cross_problems
from oarlock.config.synonyms import meaning
from oarlock.errors import ConfigError

ConfigT = typing.TypeVar("ConfigT")


@dataclass
class LoadedConfig(typing.Generic[ConfigT]):
    """A checked configuration and where each value came from ("default", "flag --x", "file.yaml:3")."""

    config: ConfigT
    origins: dict[str, str] = field(default_factory=dict)


def load_config(config_class: type[ConfigT], argv: Sequence[str]) -> LoadedConfig[ConfigT]:
    """Read `[file.yaml] [--flag value ...]`.

    Raises:
        ConfigError: with every problem found, each naming its flag or file:line and, for unknown names, the nearest.
    """
    specs = option_specs(config_class)
    problems: list[str] = []
    values: dict[str, tuple[Any, str]] = {}
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        values |= _from_file(Path(arguments.pop(0)), specs, problems)
    values |= _from_flags(arguments, specs, problems)
    converted, origins = _convert(values, specs, problems)
    if problems:
        raise ConfigError(_listing(problems))
    config = _build(config_class, converted)
    problems = cross_problems(config)
    if problems:
        raise ConfigError(_listing(problems))
    return LoadedConfig(config, origins)


def config_from_flat(config_class: type[ConfigT], flat: dict[str, Any]) -> ConfigT:
    """Build a configuration from option names and plain values (tests, saved runs); the rest are defaults."""
    arguments = [word for name, value in flat.items() if value is not None for word in (f"--{name}", str(value))]
    return load_config(config_class, arguments).config


def flatten(config: Any) -> dict[str, Any]:
    """Option name -> value, over all sections, in their order."""
    return {name: getattr(getattr(config, spec.section), name) for name, spec in option_specs(type(config)).items()}


def is_default(config: Any, origins: Mapping[str, str], name: str) -> bool:
    """Whether an option has its default because nobody gave it.

    Args:
        origins: of a LoadedConfig; where they are not known the value decides.
    """
    spec = option_specs(type(config))[name]
    if name in origins:
        return origins[name] == "default"
    return getattr(getattr(config, spec.section), name) == spec.default


def _convert(
    values: dict[str, tuple[Any, str]], specs: dict[str, OptionSpec], problems: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    converted = {name: spec.default for name, spec in specs.items()}
    origins = dict.fromkeys(specs, "default")
    for name, (raw, origin) in values.items():
        spec = specs[name]
        try:
            value = spec.convert(raw)
        except ValueError as error:
            problems.append(f"{origin}: {name} {error}")
            continue
        if (problem := spec.problem(value)) is not None:
            problems.append(f"{origin}: {name} {problem}; got {value!r}")
        converted[name], origins[name] = value, origin
    return converted, origins


def _build(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    by_section: dict[str, dict[str, Any]] = {}
    for name, spec in option_specs(config_class).items():
        by_section.setdefault(spec.section, {})[name] = values[name]
    sections = typing.get_type_hints(config_class)
    return config_class(**{section: sections[section](**items) for section, items in by_section.items()})


def _listing(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _suggest(name: str, value: Any, known: Iterable[str], specs: dict[str, OptionSpec], prefix: str = "") -> str:
    """What an unknown name probably means: what other suites call so, else the nearest name."""
    if found := meaning(name, value, specs.keys(), as_flags=bool(prefix)):
        return f": {found}"
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _names(specs: dict[str, OptionSpec]) -> dict[str, str]:
    """Every accepted spelling -> option name."""
    return {alias: name for name, spec in specs.items() for alias in (name, *spec.aliases)}


# flags


def _from_flags(words: list[str], specs: dict[str, OptionSpec], problems: list[str]) -> dict[str, tuple[str, str]]:
    """`--x value`, `--x=value`, and for yes/no options `--x` and `--no_x`; later flags win."""
    names = _names(specs)
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
            problems.append(f"unknown flag --{flag}{_suggest(flag, given, names, specs, '--')}")
            position += following is not None and not equals
            continue
        is_bool = specs[name].type is bool
        if negated:
            if equals or following is not None or not is_bool:
                problems.append(f"--{flag} takes no value and exists for yes/no options only")
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


# YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader; used only to build values of composed nodes."""


def _from_file(
    path: Path, specs: dict[str, OptionSpec], problems: list[str], parents: tuple[Path, ...] = (), named_at: str = ""
) -> dict[str, tuple[Any, str]]:
    """Read one YAML (or JSON) file; `include:` names files, relative to it, that are read before it.

    Args:
        parents: the files that include it, outermost first.
        named_at: file:line of the include.
    """
    path = path.resolve() if parents else path
    if path.resolve() in parents:
        chain = " -> ".join(p.name for p in (*parents, path))
        raise ConfigError(f"{named_at}: include: {path} includes itself (through {chain})")
    try:
        with open(path, encoding="utf-8") as stream:
            root = yaml.compose(stream, Loader=_Loader)
    except OSError as error:
        if parents:
            raise ConfigError(f"{named_at}: include: {path}: {error.strerror}") from error
        raise ConfigError(f"{path}: {error.strerror}; the first argument must be a YAML file or a flag") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected `option: value` lines")

    values: dict[str, tuple[Any, str]] = {}
    own: dict[str, tuple[Any, str]] = {}
    names, sections = _names(specs), {spec.section for spec in specs.values()}
    for key, node in _items(root, path, problems):
        if key.value == "include":
            named_at = f"{path}:{key.start_mark.line + 1}"
            for entry in _constructed(node, path, list):
                values |= _from_file(path.parent / str(entry), specs, problems, (*parents, path.resolve()), named_at)
        elif key.value in sections and isinstance(node, yaml.MappingNode):
            for inner, value in _items(node, path, problems):
                _take(inner, value, path, names, specs, own, problems, section=key.value)
        else:
            _take(key, node, path, names, specs, own, problems)
    return values | own


def _items(node: yaml.MappingNode, path: Path, problems: list[str]) -> list[tuple[yaml.Node, yaml.Node]]:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            problems.append(f"{path}:{line}: {key.value} stands already at line {seen[key.value]}")
        seen[key.value] = line
    return node.value


def _take(
    key: yaml.Node,
    node: yaml.Node,
    path: Path,
    names: dict[str, str],
    specs: dict[str, OptionSpec],
    into: dict[str, tuple[Any, str]],
    problems: list[str],
    section: str | None = None,
) -> None:
    origin = f"{path}:{key.start_mark.line + 1}"
    name = names.get(str(key.value))
    if name is None or (section is not None and specs[name].section != section):
        where = f" in section {section}" if section else ""
        inside = [n for n in names if section is None or specs[names[n]].section == section]
        known = inside if section else [*names, *{spec.section for spec in specs.values()}, "include"]
        given = node.value if isinstance(node, yaml.ScalarNode) else ""
        hint = _suggest(str(key.value), given, known, specs)
        if name is not None:
            hint = f" (it belongs to section {specs[name].section})"
        problems.append(f"{origin}: unknown key {key.value}{where}{hint}")
        return
    into[name] = (_constructed(node, path, object), origin)


def _constructed(node: yaml.Node, path: Path, kind: type) -> Any:
    loader = _Loader("")
    try:
        value = loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {error}") from error
    finally:
        loader.dispose()
    if kind is list and not isinstance(value, list):
        value = [value]
    return value
