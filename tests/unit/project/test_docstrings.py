"""Docstrings describe only arguments and attributes that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from helpers import LLM

SOURCES = sorted((LLM / "oarlock").rglob("*.py"))
HEADINGS = "Args|Attributes|Returns|Raises|Yields"


def list_described(node: ast.FunctionDef | ast.ClassDef, heading: str) -> list[str]:
    """Names in a section of a docstring."""
    text = ast.get_docstring(node) or ""
    section = re.search(rf"^{heading}:\n(.*?)(?=^(?:{HEADINGS}):$|\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^ {4}\*{0,2}(\w+):", section[1], re.MULTILINE) if section else []


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    found = function.args
    several = [*found.posonlyargs, *found.args, *found.kwonlyargs, found.vararg, found.kwarg]
    return {argument.arg for argument in several if argument}


def attributes(node: ast.ClassDef) -> set[str]:
    """Names that a class declares, defines or sets on self."""
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            names.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            names.add(inner.attr)
        elif isinstance(inner, ast.FunctionDef):
            names.add(inner.name)
    return names


def wrong_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for name in set(list_described(node, "Args")) - arguments(node):
                yield f"{node.lineno}: {node.name} has no argument {name}"
        elif isinstance(node, ast.ClassDef):
            made = [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
            for name in set(list_described(node, "Args")) - (arguments(made[0]) if made else attributes(node)):
                yield f"{node.lineno}: {node.name} has no argument {name}"
            for name in set(list_described(node, "Attributes")) - attributes(node):
                yield f"{node.lineno}: {node.name} has no attribute {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(LLM)))
def test_a_docstring_describes_what_exists(path):
    assert not list(wrong_names(ast.parse(path.read_text(encoding="utf-8")))), path


def test_undefined_names_in_docstrings_are_found():
    source = 'def f(a, *b):\n    """Do.\n\n    Args:\n        a: one.\n        c: two.\n    """\n'
    source += 'class C:\n    """Hold.\n\n    Attributes:\n        x: one.\n        y: two.\n    """\n\n    x: int\n'
    assert sorted(wrong_names(ast.parse(source))) == ["1: f has no argument c", "8: C has no attribute y"]
