"""The Python files of the product, parsed once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """One file. `name` is its path below the package (`train/loss.py`), or `../run_pretrain.py` for an entrypoint."""

    path: Path
    name: str
    package: str  # the first folder of `name`, or ""
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        """Lines of the file."""
        return self.text.count("\n")

    @property
    def module(self) -> str:
        """Dotted name below the package: `train.loss`, `train` for its __init__."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Function:
    """A function or method of the product."""

    file: SourceFile
    node: FunctionNode
    owner: str  # the class that defines it, or ""

    @property
    def name(self) -> str:
        """The function's name without its class."""
        return self.node.name

    @property
    def title(self) -> str:
        """Where the function is defined, for a list."""
        owner = f"{self.owner}." if self.owner else ""
        return f"{self.file.name}:{self.node.lineno} {owner}{self.name}"

    @property
    def is_special(self) -> bool:
        """Whether Python calls the function by its name (`__init__`, `__exit__`)."""
        return self.name.startswith("__")

    @property
    def body(self) -> list[ast.stmt]:
        """The statements without the docstring."""
        return self.node.body[1:] if ast.get_docstring(self.node) else self.node.body

    @property
    def num_lines(self) -> int:
        """Lines from the first statement to the last, without the docstring."""
        body = self.body
        return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


class SourceTree:
    """The package llm/oarlock and the entrypoints in llm/.

    Args:
        root: of the repository.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "llm" / "oarlock"
        self.files = [self._read(path) for path in sorted((root / "llm").rglob("*.py"))]

    def _read(self, path: Path) -> SourceFile:
        inside = self.package in path.parents
        name = path.relative_to(self.package).as_posix() if inside else f"../{path.relative_to(self.root / 'llm')}"
        text = path.read_text(encoding="utf-8")
        package = name.split("/")[0] if inside and "/" in name else ""
        return SourceFile(path, name, package, text, ast.parse(text))

    @cached_property
    def functions(self) -> list[Function]:
        """Every function, method and nested function."""
        return [function for file in self.files for function in _functions(file, file.tree, "")]

    @cached_property
    def word_counts(self) -> Counter[str]:
        """How often each word occurs in the product's text."""
        return Counter(word for file in self.files for word in re.findall(r"\w+", file.text))

    @cached_property
    def docstrings(self) -> list[tuple[SourceFile, Documented, str]]:
        """Every docstring with the object it describes."""
        return [
            (file, node, text)
            for file in self.files
            for node in ast.walk(file.tree)
            if isinstance(node, Documented) and (text := ast.get_docstring(node))
        ]


def _functions(file: SourceFile, parent: ast.AST, owner: str) -> Iterator[Function]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, FunctionNode):
            yield Function(file, node, owner)
            yield from _functions(file, node, "")
        else:
            yield from _functions(file, node, node.name if isinstance(node, ast.ClassDef) else owner)
