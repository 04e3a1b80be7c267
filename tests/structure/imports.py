"""Import graphs inside a package and between packages. Imports in functions and under TYPE_CHECKING count."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from structure.source_tree import SourceFile, SourceTree

Graph = Mapping[str, Iterable[str]]


def import_graph(tree: SourceTree) -> dict[str, set[str]]:
    """The files that each file imports, by name (`train/loss.py`)."""
    modules = {file.module: file.name for file in tree.files if not file.name.startswith("../")}
    return {file.name: set(_imported(file, modules)) - {file.name} for file in tree.files}


def _imported(file: SourceFile, modules: dict[str, str]) -> Iterable[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "oarlock":
            inside = node.module.removeprefix("oarlock").removeprefix(".")
            for alias in node.names:
                member = f"{inside}.{alias.name}".removeprefix(".")
                target = modules.get(member) or modules.get(inside)
                if target:
                    yield target
        elif isinstance(node, ast.Import):
            yield from (
                modules[name]
                for a in node.names
                if (name := a.name.removeprefix("oarlock.")) != a.name and name in modules
            )


def file_circles(graph: Graph, packages: Mapping[str, str]) -> list[list[str]]:
    """Sets of files of one package that import each other in a circle.

    Args:
        packages: the package of every file.
    """
    inside = {name: {other for other in others if packages[other] == packages[name]} for name, others in graph.items()}
    return circles(inside)


def package_graph(graph: Graph, packages: Mapping[str, str]) -> dict[str, set[str]]:
    """The packages that each package imports.

    Templates of Triton's model.py are left out: they are copied into repositories, and import what is copied with them.
    """
    found: dict[str, set[str]] = {package: set() for package in packages.values() if package}
    for name, others in graph.items():
        if packages[name] and not name.startswith("triton_repository/models/"):
            found[packages[name]] |= {packages[other] for other in others} - {packages[name], ""}
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            position = stack.index(node)
            if len(stack) - position > 1:
                found.append(sorted(stack[position:]))
            del stack[position:]

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found
