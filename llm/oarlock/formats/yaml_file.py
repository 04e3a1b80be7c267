"""Reading untrusted YAML: bounded size, depth and alias expansion, and only tags of the core schema."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from oarlock.errors import ConfigError, OarlockError

MAX_BYTES = 1 << 19  # PyYAML takes up to a second for them
MAX_NODES = 20_000  # values and keys; an alias counts as many as it expands to
MAX_DEPTH = 32  # levels of lists and mappings
MAX_DIGITS = 40  # of an integer; 64 bits have 20. Python refuses thousands, or takes seconds
_PREFIX = "tag:yaml.org,2002:"
_NUMBERS = (f"{_PREFIX}int", f"{_PREFIX}float")
_NOT_CORE = re.compile(r"[-+]?0[0-9_]+|.*:.*")  # numbers of YAML 1.1 only: 010 is 8 there, 1:30 is 90
_CORE = {f"{_PREFIX}{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")}


@dataclass
class Budget:
    """The bytes and nodes left to read for files that belong together (a recipe and its includes)."""

    bytes: int = MAX_BYTES
    nodes: int = MAX_NODES


class _Problem(Exception):
    """A problem of the file, and its line (from 1)."""

    def __init__(self, line: int, sentence: str) -> None:
        super().__init__(sentence)
        self.line = line


class _Loader(yaml.SafeLoader):
    """SafeLoader that counts the nodes it composes, and checks values before building them."""

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        super().__init__(text)
        self._budget = budget or Budget()
        self._depth = 0
        self._sizes: dict[str, int] = {}  # nodes behind an anchor, once it is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        anchor: str = getattr(event, "anchor", None) or ""
        before = self._budget.nodes
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self._sizes:
                raise _Problem(line, f"*{anchor} is used inside its own value")
            self._budget.nodes -= self._sizes.get(anchor, 0)
        elif (tag := event.tag) not in (None, "!") and tag not in _CORE:
            raise _Problem(line, f"tag {_short(tag)} is not one of YAML's core schema (str, int, float, bool, ...)")
        self._budget.nodes -= 1
        if self._budget.nodes < 0:
            raise _Problem(line, f"more than {MAX_NODES:,} values, with aliases expanded")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Problem(line, f"lists and mappings more than {MAX_DEPTH} levels deep")
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
            raise _Problem(line, "a value contains a lone surrogate")
        if node.tag == f"{_PREFIX}int" and sum(map(str.isalnum, node.value)) > MAX_DIGITS:
            raise _Problem(line, f"an integer of more than {MAX_DIGITS} digits; quote it if it is a string")
        if plain and node.tag in _NUMBERS and _NOT_CORE.fullmatch(node.value):
            node.tag = f"{_PREFIX}str"
        if node.tag == f"{_PREFIX}timestamp":  # of YAML 1.1; a string in the core schema
            self._check(node, self.construct_yaml_timestamp, "a date that does not exist; quote it if it is a string")
        elif node.tag == f"{_PREFIX}int":
            self._check(node, self.construct_yaml_int, "not an integer")
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
                raise _Problem(line, "a key must be a string; this one is a list or a mapping")
            if key.tag == f"{_PREFIX}null":
                raise _Problem(line, "a key must be a string; this one is empty")
            if key.value in seen and key.tag != f"{_PREFIX}merge":
                raise _Problem(line, f"{_short(key.value)} is already defined at line {seen[key.value]}")
            seen[key.value] = line
        return node


def compose_text(
    content: str | bytes, name: str, *, budget: Budget | None = None, error: type[OarlockError] = ConfigError
) -> yaml.Node | None:
    """Parse a YAML (or JSON) text to nodes, whose marks hold their lines. Return None for an empty text.

    Args:
        name: the name of the text in messages, before :line.
        budget: what may still be read; reduced by this text.

    Raises:
        OarlockError: of class `error`, with the line and the reason.
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
    """Return the value of a node of `compose_text`: a string, number, bool, None, list or dict.

    Raises:
        OarlockError: of class `error`, for a tag that does not fit its node (`!!int [1]`).
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
    """Convert errors of PyYAML and its constructors to one sentence."""
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
