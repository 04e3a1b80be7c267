"""Read a YAML file of others: bounded in size, depth and what its aliases stand for; tags of the core schema alone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from oarlock.errors import ConfigError, OarlockError

LARGEST = 1 << 19  # bytes; PyYAML takes up to a second for so many
MOST_NODES = 20_000  # values and keys, an alias counted as all that it stands for
DEEPEST = 32  # levels of lists and mappings
LONGEST_NUMBER = 40  # digits of a whole number; 64 bits have 20. Python refuses, or takes seconds for, thousands
_PREFIX = "tag:yaml.org,2002:"
_NUMBERS = (f"{_PREFIX}int", f"{_PREFIX}float")
_NOT_CORE = re.compile(r"[-+]?0[0-9_]+|.*:.*")  # numbers of YAML 1.1 alone: 010 is 8 there, 1:30 is 90
_CORE = {f"{_PREFIX}{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")}


@dataclass
class Budget:
    """What is left to read of files that belong together (a recipe and its includes)."""

    bytes: int = LARGEST
    nodes: int = MOST_NODES


class _Problem(Exception):
    """What is wrong, and the line (from 1)."""

    def __init__(self, line: int, sentence: str) -> None:
        super().__init__(sentence)
        self.line = line


class _Loader(yaml.SafeLoader):
    """SafeLoader that counts what it composes, and builds no value that it can't."""

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        super().__init__(text)
        self._budget = budget or Budget()
        self._depth = 0
        self._sizes: dict[str, int] = {}  # of what an anchor stands for, once it is read to its end

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        anchor: str = getattr(event, "anchor", None) or ""
        before = self._budget.nodes
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self._sizes:
                raise _Problem(line, f"*{anchor} is inside the value that it stands for")
            self._budget.nodes -= self._sizes.get(anchor, 0)
        elif (tag := event.tag) not in (None, "!") and tag not in _CORE:
            raise _Problem(line, f"tag {_short(tag)} is not one of YAML's core schema (str, int, float, bool, ...)")
        self._budget.nodes -= 1
        if self._budget.nodes < 0:
            raise _Problem(line, f"more than {MOST_NODES:,} values, aliases counted as what they stand for")
        self._depth += 1
        if self._depth > DEEPEST:
            raise _Problem(line, f"lists and mappings more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor and not isinstance(event, yaml.AliasEvent):
            self._sizes[anchor] = before - self._budget.nodes
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        plain = self.peek_event().tag is None
        node = super().compose_scalar_node(anchor)
        line = node.start_mark.line + 1
        if "\0" in node.value:
            raise _Problem(line, "a value can't hold a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _Problem(line, "a value holds half a character (a lone surrogate)")
        if node.tag == f"{_PREFIX}int" and sum(map(str.isalnum, node.value)) > LONGEST_NUMBER:
            raise _Problem(line, f"a whole number of more than {LONGEST_NUMBER} digits; quote it if text is meant")
        if plain and node.tag in _NUMBERS and _NOT_CORE.fullmatch(node.value):
            node.tag = f"{_PREFIX}str"
        if node.tag == f"{_PREFIX}timestamp":  # of YAML 1.1; in the core schema it is text
            self._check(node, self.construct_yaml_timestamp, "a date that does not exist; quote it if text is meant")
        elif node.tag == f"{_PREFIX}int":
            self._check(node, self.construct_yaml_int, "not a whole number")
            return node
        elif node.tag == f"{_PREFIX}float":
            self._check(node, self.construct_yaml_float, "not a number")
            return node
        elif node.tag == f"{_PREFIX}bool":
            self._check(node, self.construct_yaml_bool, "neither true nor false")
            return node
        if node.tag in (f"{_PREFIX}timestamp", f"{_PREFIX}value"):
            node.tag = f"{_PREFIX}str"
        return node

    def _check(self, node: yaml.ScalarNode, construct: Any, problem: str) -> None:
        try:
            construct(node)
        except (ValueError, KeyError, IndexError, OverflowError, yaml.YAMLError) as error:
            raise _Problem(node.start_mark.line + 1, f"{_short(node.value)} is {problem}") from error

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Problem(line, "a key must be text; this one is a list or a mapping")
            if key.tag == f"{_PREFIX}null":
                raise _Problem(line, "a key must be text; this one is empty")
            if key.value in seen and key.tag != f"{_PREFIX}merge":
                raise _Problem(line, f"{_short(key.value)} stands already at line {seen[key.value]}")
            seen[key.value] = line
        return node


def compose_text(
    content: str | bytes, name: str, *, budget: Budget | None = None, error: type[OarlockError] = ConfigError
) -> yaml.Node | None:
    """The nodes of a YAML text (JSON too), whose marks know their lines; None for an empty one.

    Args:
        name: stands before :line in messages.
        budget: what may still be read; less what this text took afterwards.

    Raises:
        OarlockError: of the class given, naming line and what is right.
    """
    budget = budget or Budget()
    text = _decoded(content, name, error) if isinstance(content, bytes) else content
    budget.bytes -= len(content)
    with _sentences(text, name, error):
        loader = _Loader(text, budget)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()


def value_of(node: yaml.Node, name: str, *, error: type[OarlockError] = ConfigError) -> Any:
    """The value of a node that `compose_text` gave: text, number, bool, None, list or dict.

    Raises:
        OarlockError: of the class given, for a tag on a node of another kind (`!!int [1]`).
    """
    with _sentences("", name, error):
        loader = _Loader("")
        try:
            return loader.construct_object(node, deep=True)
        finally:
            loader.dispose()


def _decoded(content: bytes, name: str, error: type[OarlockError]) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(f"{name}:{line}: not valid YAML: not UTF-8 (byte 0x{content[problem.start]:02x})") from problem


@contextlib.contextmanager
def _sentences(text: str, name: str, error: type[OarlockError]) -> Iterator[None]:
    """Turn what PyYAML and its constructors raise into one sentence."""
    try:
        yield
    except _Problem as problem:
        raise error(f"{name}:{problem.line}: {problem}") from problem
    except yaml.reader.ReaderError as problem:
        line = text.count("\n", 0, problem.position) + 1
        code = problem.character if isinstance(problem.character, int) else ord(problem.character)
        raise error(f"{name}:{line}: not valid YAML: a character that is not allowed (U+{code:04X})") from problem
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        sentence = ", ".join(part for part in (problem.context, problem.problem) if part)
        if problem.context == "expected a single document in the stream":
            sentence = "a second document begins; a file may hold only one"
        raise error(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {_short(sentence)}") from problem
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as problem:
        raise error(f"{name}: not valid YAML: {_short(str(problem))}") from problem


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:100]}..."
