"""Functions and classes: used once, one statement, too long, without a verb; duplicate class names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict

from structure.source_tree import Function, SourceTree
from structure.verbs import has_verb

MAX_LINES = 60
MAX_CALLER_LINES = 40


def used_once(tree: SourceTree) -> list[Function]:
    """Functions whose name occurs only once more in the product's text, special methods left out."""
    return [f for f in tree.functions if not f.is_special and tree.word_counts[f.name] == 2]


def mentions(tree: SourceTree, names: set[str]) -> dict[str, list[str]]:
    """Where each of these words occurs, as `file:line`."""
    found = defaultdict(list)
    for file in tree.files:
        for number, line in enumerate(file.text.splitlines(), 1):
            for word in names.intersection(re.findall(r"\w+", line)):
                found[word].append(f"{file.name}:{number}")
    return found


def inlinable(tree: SourceTree) -> list[Function]:
    """Functions used once, short, in the same file as their only caller, which stays short with their lines in it.

    Functions with decorators are left out: a framework calls them. So are those that the tests name.
    """
    once = {function.name: function for function in used_once(tree) if not function.node.decorator_list}
    tested = set(re.findall(r"\w+", "".join(path.read_text() for path in (tree.root / "tests").rglob("*.py"))))
    found = []
    for caller in tree.functions:
        for node in ast.walk(caller.node):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            callee = once.get(name)
            fits = callee and callee.num_lines <= 4 and caller.num_lines + callee.num_lines <= MAX_CALLER_LINES
            if callee and fits and callee.file is caller.file and callee is not caller and name not in tested:
                found.append(callee)
                del once[name]
    return found


def one_statement(tree: SourceTree) -> list[Function]:
    """Functions whose body is one statement, special methods left out."""
    return [f for f in tree.functions if not f.is_special and len(f.body) == 1]


def ordinary(tree: SourceTree) -> list[Function]:
    """All functions except special methods."""
    return [f for f in tree.functions if not f.is_special]


def too_long(tree: SourceTree) -> list[Function]:
    """Functions of more than MAX_LINES lines."""
    return [f for f in tree.functions if f.num_lines > MAX_LINES]


def without_verb(tree: SourceTree) -> list[Function]:
    """Functions whose name has no verb; properties, constructors and nested functions are left out."""
    return [f for f in ordinary(tree) if not _is_property(f) and not has_verb(f.name)]


def _is_property(function: Function) -> bool:
    words = {word for node in function.node.decorator_list for word in re.findall(r"\w+", ast.unparse(node))}
    return bool(words & {"property", "cached_property", "setter", "classmethod"})


def repeated_classes(tree: SourceTree) -> dict[str, list[str]]:
    """Public class names that are defined more than once, with their places."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in tree.files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(f"{file.name}:{node.lineno}")
    return {name: places for name, places in sorted(found.items()) if len(places) > 1}


# Relative clauses, indirect questions, prepositions without a main clause, and bare references.
# Noun phrases ("The number of ranks.", "Whether the run has ended.") are usual for properties and questions, and pass.
_FRAGMENT = re.compile(
    r"(That|Which|Who|Whose|Whom|Where|What|How)\b"
    r"|(Of|By|In|On|At|For|From|To|With|Without|Into|After|Before|Until|As|Per|Between|Under|Over|Among|About|Like|Because"
    r"|So|And|Or|But|Than|If|When|While|Since|Through|Out|Behind|Beside|Above|Below|Against|The same)\b[^,:]*$"
    r"|None\b[^ ]*$|See [^ ]*$"
)


def fragments(tree: SourceTree) -> list[str]:
    """Docstrings of functions and classes whose first sentence is a fragment."""
    found = []
    for file, node, text in tree.docstrings:
        first = re.split(r"(?<=[.!?:])\s", text, maxsplit=1)[0].rstrip(".").replace("\n", " ")
        if not isinstance(node, ast.Module) and _FRAGMENT.match(first):
            found.append(f"{file.name}:{node.lineno} {node.name}: {text.splitlines()[0]}")
    return found
