"""Reading a recipe: a YAML (or JSON) file and the files that it includes. Every value has its file and line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from oarlock.config.options import OptionSpec, shown
from oarlock.config.problems import Problems, map_spellings, suggest
from oarlock.errors import ConfigError
from oarlock.formats.files import read_bytes
from oarlock.formats.yaml_file import Budget, compose_text, value_of

MOST_FILES = 64  # of one recipe; the published ones include four
_LONGEST_PATH = 4096  # characters, the limit of Linux; realpath would take minutes for longer ones
_EMPTY = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")

# Option name -> (YAML value, "file:line").
Values = dict[str, tuple[Any, str]]


class RecipeFiles:
    """The files of one recipe. Each is read once, and all of them share one budget.

    `include:` names files, relative to the file that includes them. They may be anywhere, but only regular files are
    opened, and only YAML is parsed.
    """

    def __init__(self, specs: dict[str, OptionSpec], problems: Problems) -> None:
        self._specs, self._problems = specs, problems
        self._names = map_spellings(specs)
        self._sections = {spec.section for spec in specs.values()}
        self._budget = Budget()
        self._read: dict[Path, Values] = {}

    def read(self, path: Path) -> Values:
        """The values of a recipe; they override those of its includes. Problems with single values are collected.

        Raises:
            ConfigError: a file can't be read or is not a recipe.
        """
        return self._values(path, read_bytes(path, limit=self._budget.bytes, what="YAML file", error=ConfigError), ())

    def _included(self, path: Path, parents: tuple[Path, ...], named_at: str) -> Values:
        path = _real(path)
        if path in parents:
            chain = " -> ".join(p.name for p in (*parents, path))
            raise ConfigError(f"{named_at}: include: {path} includes itself (through {chain})")
        if path not in self._read:
            if len(self._read) >= MOST_FILES:
                raise ConfigError(f"{named_at}: include: {path}: more than {MOST_FILES} files in one recipe")
            try:
                content = read_bytes(path, limit=self._budget.bytes, what="YAML file", error=ConfigError)
            except ConfigError as error:
                raise ConfigError(f"{named_at}: include: {error}") from error
            self._read[path] = {}  # counted before its own includes
            self._read[path] = self._values(path, content, parents)
        return self._read[path]

    def _values(self, path: Path, content: bytes, parents: tuple[Path, ...]) -> Values:
        root = compose_text(content, str(path), budget=self._budget)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected `option: value` lines")
        included: Values = {}
        own: Values = {}
        for key, node in root.value:
            if key.value == "include":
                named_at = f"{path}:{key.start_mark.line + 1}"
                value = value_of(node, str(path))
                names = value if isinstance(value, list) else [value]
                for name in names:
                    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_PATH:
                        raise ConfigError(f"{named_at}: include expects file names; got {shown(name)}")
                for name in names:
                    included |= self._included(path.parent / name, (*parents, _real(path)), named_at)
            elif key.value in self._sections and isinstance(node, yaml.MappingNode):
                for inner, inner_node in node.value:
                    self._add_value(inner, inner_node, path, own, section=key.value)
            else:
                self._add_value(key, node, path, own)
        return included | own

    def _add_value(self, key: yaml.Node, node: yaml.Node, path: Path, into: Values, section: str | None = None) -> None:
        origin = f"{path}:{key.start_mark.line + 1}"
        specs, names = self._specs, self._names
        name = names.get(str(key.value))
        if name is None or (section is not None and specs[name].section != section):
            where = f" in section {section}" if section else ""
            inside = [n for n in names if section is None or specs[names[n]].section == section]
            known = inside if section else [*names, *self._sections, "include"]
            given = node.value if isinstance(node, yaml.ScalarNode) else ""
            hint = suggest(str(key.value), given, known, specs)
            if name is not None:
                hint = f" (it belongs to section {specs[name].section})"
            self._problems.append(f"{origin}: unknown key {shown(key.value, quoted=False)}{where}{hint}")
            return
        written = isinstance(node, yaml.ScalarNode) and specs[name].type is str and node.tag not in _EMPTY
        # Text is kept as it is written: 1.50 is not 1.5, and no is not False.
        into[name] = (node.value if written else value_of(node, str(path)), origin)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for circular links
